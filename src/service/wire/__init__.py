"""Wire formats of the training protocol."""
