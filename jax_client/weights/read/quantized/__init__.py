"""Quantised releases: files that hold codes and scales, read as the float tensors that they stand for."""
