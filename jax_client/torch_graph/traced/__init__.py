"""An uploaded loss as jax traces it: one program for many lengths, within limits, compiled beside everything else."""
