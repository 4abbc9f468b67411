"""What the service serves: models, their sessions, and weights to sample from."""
