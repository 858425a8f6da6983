"""`jax_client doctor`: is this machine set up? One module for each kind of check, one for what a check finds."""
