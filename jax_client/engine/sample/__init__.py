"""Sampling: the serving loop, its schedule, the cache's pages and the programs that decode."""
