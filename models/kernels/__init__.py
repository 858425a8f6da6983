"""Attention per platform: plain JAX in blocks, splash on TPU, cuDNN on NVIDIA, pages for sampling."""
