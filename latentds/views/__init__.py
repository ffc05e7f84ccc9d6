"""Augmented views of a batch, made on its device: crops, turns, colour, stain, blur."""
