"""What runs on the devices to sample: the cache, the weights, the programs, and the drawing of tokens."""
