"""`jax_client dashboard`."""
