"""Latents that others made, as data sets."""
