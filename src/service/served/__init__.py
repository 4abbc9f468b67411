"""What the service serves: models, sessions, samplers and their operations."""
