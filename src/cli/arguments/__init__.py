"""What the commands' arguments name: models, backends, and objects by their place in a module."""
