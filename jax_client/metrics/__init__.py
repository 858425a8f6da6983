"""The record of every run: metrics and events in one SQLite file."""
