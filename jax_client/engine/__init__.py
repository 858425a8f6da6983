"""The accelerator: packing, compiled programs, adapters, optimizer and sampler of one base model on one mesh."""
