"""The parts of a decoder layer: attention, the layer itself, LoRA."""
