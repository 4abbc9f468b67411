"""DPO on the native backend: the reference scores each pair once, calls accumulate, one division at the step."""

from __future__ import annotations

import torch

from pullback import AdamParams, TorchBackend, recipe, with_reference
from pullback.datums import preference_pair
from pullback.testing import TinyLM

backend = TorchBackend(TinyLM(dtype=torch.float32), reference=TinyLM(dtype=torch.float32))
loss, normalization = recipe("dpo")
pairs = [preference_pair([1, 2], [3, 4], [5, 6, 7]), preference_pair([8], [9, 9], [10])]
data = with_reference([datum for pair in pairs for datum in pair], backend.reference())

for step in range(10):
    for call in (data[:2], data[2:]):  # whole pairs
        result = backend.forward_backward(call, loss).result()
    output = backend.optim_step(AdamParams(learning_rate=1e-2), normalization).result()
    if step % 3 == 0:
        print(step, output.normalization, round(result.metrics["margin:mean"], 3))
