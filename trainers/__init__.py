"""Recipes of latentds, one a file."""
