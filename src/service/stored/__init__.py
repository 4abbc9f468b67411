"""Checkpoints of the models that are served: saved, copied, saved at the end, and cleared away."""
