"""How the operations of a backend run: one at a time, into futures, and what they accumulate between two optimizer steps."""
