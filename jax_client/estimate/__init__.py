"""Will a model train and sample on chips that are not here, and how fast? From its config, and from XLA's compilers."""
