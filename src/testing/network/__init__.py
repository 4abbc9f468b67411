"""A failing network, for tests of clients and services."""
