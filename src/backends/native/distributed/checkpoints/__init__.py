"""Checkpoints of a sharded model: the files of one process, which any number of processes writes and reads."""
