"""Models that the native backend can load, and what it finds out about them."""
