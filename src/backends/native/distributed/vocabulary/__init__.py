"""A head whose rows are dealt out to the processes: which model has one, the rows of each, and what they cost."""
