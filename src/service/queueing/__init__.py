"""Operations in their order: turns of keys, queues of models, and what a client has been told."""
