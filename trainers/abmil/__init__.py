"""Attention-based multiple-instance learning: what a slide's patches say of its label."""
