"""Policy-gradient losses on sampled tokens."""
