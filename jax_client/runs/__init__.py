"""Bookkeeping without arrays: sessions, runs and samplers, request order, validation, names and paths."""
