"""What everything stands on: random numbers, files, foreign text, metrics."""
