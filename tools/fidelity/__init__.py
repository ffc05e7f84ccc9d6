"""Parts of `latentds bench fidelity`."""
