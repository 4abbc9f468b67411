"""Whether a model trains as itself, by its own code; and how exact its log-probs are."""
