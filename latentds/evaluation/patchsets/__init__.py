"""Patches of any source behind one interface: originals, a codec on the fly, latents."""
