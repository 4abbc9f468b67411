"""A plain PyTorch loop that takes only its loss from pullback."""

from __future__ import annotations

import torch

from pullback.losses import CrossEntropy, TokenBatch
from pullback.testing import TinyLM

model = TinyLM(dtype=torch.float32)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
loss = CrossEntropy("token_mean")
tokens = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
positions = torch.arange(4).expand(2, 4)

for step in range(20):
    logits = model.hidden_states(tokens[:, :-1], positions) @ model.head().weight.T
    logprobs = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    output = loss.evaluate(TokenBatch.from_padded(logprobs, torch.ones_like(logprobs)))
    optimizer.zero_grad()
    torch.autograd.backward(output.loss)
    optimizer.step()
    if step % 5 == 0:
        print(step, round(output.loss.item(), 3))
