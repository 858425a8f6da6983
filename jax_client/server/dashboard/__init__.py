"""The page that shows runs, and lets a person talk to their checkpoints."""
