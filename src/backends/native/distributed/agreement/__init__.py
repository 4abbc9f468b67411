"""What the processes tell each other, so that all of them do the same, or none."""
