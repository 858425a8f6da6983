"""Sampling: the serving loop, its schedule, the pages of the cache and the batches of the programs."""
