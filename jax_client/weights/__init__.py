"""Models in: which files a model name means, their tensors on the mesh, their tokenizer."""
