"""What policy losses are put together from: ratios, clip ranges, KL penalties, advantages."""
