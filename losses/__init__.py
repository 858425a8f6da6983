"""Losses: each a function of target logprobs and per-token inputs, summed and never normalised."""
