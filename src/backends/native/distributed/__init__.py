"""One model on many processes: who scores what, what all of them agree on, and how weights and gradients are sharded."""
