"""Fine-tune a decoder, or train a small student, for latents that stay as they are."""
