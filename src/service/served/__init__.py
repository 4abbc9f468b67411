"""What the service serves: models, their sessions and training, and weights to sample from."""
