"""What comes back: the API's types, the metrics of a run, and records of checkpoints."""
