"""Sampling and scoring for the page."""
