"""A network that fails, for tests of clients and services."""
