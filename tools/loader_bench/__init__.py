"""Parts of `latentds bench loader`."""
