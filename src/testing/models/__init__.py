"""Small models for tests: exact ones, and ones with a planted leak."""
