"""The parts of latentds bench step."""
