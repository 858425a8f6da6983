"""`jax_client doctor`: is this machine set up, and if not, what is to be done?"""
