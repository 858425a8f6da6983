"""`jax_client estimate` and `jax_client model list`: what would models take on a machine, this one or another?"""
