"""Models in: the files that a model name means, their tensors on the mesh, their tokenizer."""
