"""Engines beside the trainer that only sample: Ray actors, each with the base weights on devices of its own."""
