"""Folds, scores, statistics and records of evaluations."""
