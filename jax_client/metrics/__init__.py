"""The metrics and events of every run, in one SQLite file."""
