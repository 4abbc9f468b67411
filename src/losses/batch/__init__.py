"""What a loss is given: log-probs and inputs of tokens, in one of two layouts."""
