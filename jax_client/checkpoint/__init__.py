"""Checkpoints and runs on disk. What was acknowledged is whole, or its damage is reported."""
