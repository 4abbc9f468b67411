"""Losses that a client sends as a graph of tensor operations."""
