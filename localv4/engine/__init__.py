"""Loaded models and their timelines."""
