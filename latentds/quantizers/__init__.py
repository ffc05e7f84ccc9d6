"""Latents to stored bytes and back: scalar, additive and entropy-coded codebooks."""
