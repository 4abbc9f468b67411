"""A service whose models are trained by several processes: the first one speaks HTTP, the others follow it."""
