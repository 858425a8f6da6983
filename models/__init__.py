"""Model families: sizes from config.json, parameters as Flax NNX modules, layers as pure functions over them."""
