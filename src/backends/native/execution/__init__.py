"""How the native backend runs a call: micro-batches, forward, backward, memory."""
