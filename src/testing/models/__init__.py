"""Small models for tests: exact ones, ones with a planted leak, and tiny ones of every architecture."""
