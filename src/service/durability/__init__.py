"""What survives a crash: the journal, the order of operations, checkpoints."""
