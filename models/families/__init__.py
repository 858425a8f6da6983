"""One file per model family: which keys of a config.json it reads, and what it refuses."""
