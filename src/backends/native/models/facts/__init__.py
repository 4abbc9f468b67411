"""What is found out about a model before it is used: from its config, and by probes."""
