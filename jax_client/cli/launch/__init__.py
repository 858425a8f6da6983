"""`jax_client launch`: one command on every host, which joins them into a cluster and runs the program on the first."""
