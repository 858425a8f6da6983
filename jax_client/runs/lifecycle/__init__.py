"""What lives: sessions, base models, runs, samplers, their checkpoints, and in which order requests start."""
