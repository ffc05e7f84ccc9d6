"""Features of slides in files that other tools read."""
