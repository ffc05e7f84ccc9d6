"""Classify patches: a probe of frozen features, or a network of timm trained as a whole."""
