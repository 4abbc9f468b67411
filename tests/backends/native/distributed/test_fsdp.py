"""selected_logprobs in somebody's sharded trainer: two real processes, FSDP2, the gradient of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pullback

SCRIPT = """
import sys, torch, torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from pullback.backends import Head, logprob_surrogate, selected_logprobs
from pullback.errors import UnsupportedError

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)

class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(8, 8)
        self.head = nn.Linear(8, 31, bias=False)

    def forward(self, x, targets, known):
        hidden, head = torch.tanh(self.trunk(x)), Head(self.head.weight)
        if known:
            return logprob_surrogate(hidden, head, targets, torch.ones(len(targets)))[0]
        return selected_logprobs(hidden, head, targets).sum()

def build():
    torch.manual_seed(0)
    return Policy()

x, targets = torch.randn(12, 8, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 31
for known in (False, True):
    whole = build()
    whole(x, targets, False).backward()
    sharded = build()
    mesh = dist.init_device_mesh("cpu", (2,))
    fully_shard(sharded, mesh=mesh)
    own = slice(6 * rank, 6 * rank + 6)
    sharded(x[own], targets[own], known).backward()
    for (name, a), b in zip(sharded.named_parameters(), whole.parameters()):
        found = 2 * a.grad.full_tensor()  # FSDP averages over ranks; the whole is a sum
        assert torch.allclose(found, b.grad, atol=1e-5), (name, known)

weight = sharded.head.weight
assert hasattr(weight, "full_tensor")
hidden = torch.randn(3, 8, requires_grad=True)
try:
    selected_logprobs(hidden, Head(weight), targets[:3])
except UnsupportedError as error:
    assert "DTensor" in str(error)
else:
    raise AssertionError("a trainable sharded weight was taken")
weight.requires_grad_(False)
frozen = selected_logprobs(hidden, Head(weight), targets[:3])
assert torch.allclose(frozen, selected_logprobs(hidden, Head(weight.full_tensor()), targets[:3]))
frozen.sum().backward()
assert hidden.grad is not None
dist.destroy_process_group()
print("ok")
"""


@pytest.mark.slow  # what runs on two ranks in the quick tier: tests/backends/native/distributed/test_exact.py
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this build of PyTorch has no torch.distributed")
def test_inside_a_sharded_module(tmp_path: Path) -> None:
    """Late and known cotangents reduce like every other gradient; a sharded trainable weight is refused, a frozen gathered."""
    path = str(Path(pullback.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SCRIPT, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        out, errors = rank.communicate(timeout=600)
        assert (rank.returncode, out.strip()) == (0, "ok"), errors
