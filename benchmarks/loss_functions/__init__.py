"""Benchmarks of the losses alone, beside hand-written code and other libraries' own functions."""
