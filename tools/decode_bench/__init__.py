"""What `latentds bench decode` is made of."""
