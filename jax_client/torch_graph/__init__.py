"""An uploaded torch loss (torch.fx) as a JAX function, from a fixed table of operations."""
