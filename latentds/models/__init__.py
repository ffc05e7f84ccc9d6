"""Networks that are trained beside or on top of what the library decodes."""
