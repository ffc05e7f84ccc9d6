"""The parts of latentds doctor."""
