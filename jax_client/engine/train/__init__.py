"""Training: packing, the forward, backward and optimizer programs, and their results."""
