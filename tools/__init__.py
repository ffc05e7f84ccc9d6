"""Commands of latentds, one a file; `cli` finds them."""
