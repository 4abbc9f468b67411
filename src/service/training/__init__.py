"""Training for clients: gradients, losses of their own, whose graphs are kept for the backward, and optimizer steps."""
