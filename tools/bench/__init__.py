"""Measurements: one command a file, and what they share."""
