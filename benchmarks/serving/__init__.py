"""Benchmarks of a service: its clients, and what passes between."""
