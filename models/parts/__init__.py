"""The parts of a decoder layer: attention, the layer itself, matmul, norm, rotary positions, LoRA."""
