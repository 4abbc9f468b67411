"""Checkpoints of a model that this process trains, and its weights for other libraries."""
