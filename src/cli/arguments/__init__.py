"""What the commands' arguments name: models, backends, and objects of a module."""
