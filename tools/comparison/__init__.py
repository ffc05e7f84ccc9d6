"""What `latentds compare` is made of."""
