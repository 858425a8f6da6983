"""What the server knows: pending requests, models, samplers, and what survives a restart."""
