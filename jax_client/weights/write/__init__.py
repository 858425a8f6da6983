"""Models out: PEFT adapters (and back in), merged models, safetensors shards."""
