"""Decoding: the completions of many requests together, one more token each at every step."""
