"""Data sets on the Hugging Face Hub: publish, fetch."""
