"""From a loss's terms to its value, its cotangent and its metrics."""
