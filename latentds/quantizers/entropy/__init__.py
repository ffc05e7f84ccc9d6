"""Entropy-coded records of equal size: the model, its tables, the coder."""
