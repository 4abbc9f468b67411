"""The Triton softmax: PyTorch's result, through Triton's interpreter, and a binary for a GPU that need not be there."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pullback.ops import Head, selected_logprobs, softmax

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton (Linux)")

INTERPRETED = """
import torch
from pullback.ops import Head, logprob_surrogate, selected_logprobs, softmax
fused, plain = softmax.fused_softmax_, softmax.plain_softmax_
assert softmax.agrees(torch.device("cpu"))
hidden, weight = torch.randn(9, 16, requires_grad=True), torch.randn(300, 16)
targets = torch.randint(300, (9,))
results, calls = [], []
softmax.fused_softmax_ = lambda *call: (calls.append(1), fused(*call))[1]
for kernel in (False, True):
    softmax.is_available = lambda device: kernel
    logprobs = selected_logprobs(hidden, Head(weight, scale=0.5), targets, temperature=0.7, memory_budget=4 * 9 * 64)
    results.append((logprobs, torch.autograd.grad(logprobs.sum(), hidden)[0]))
for theirs, ours in zip(*results):
    assert torch.allclose(theirs, ours, rtol=1e-4, atol=1e-5), (theirs, ours)
assert len(calls) == 5  # tiles of 64 columns
results, weight = [], weight.requires_grad_()
for kernel in (False, True):
    softmax.is_available = lambda device: kernel
    value, logprobs = logprob_surrogate(hidden, Head(weight), targets, torch.arange(9.0))
    again = selected_logprobs(hidden, Head(weight), targets)
    grads = [torch.autograd.grad(x, (hidden, weight)) for x in (value, again.sum())]
    results.append((logprobs, again, *grads[0], *grads[1]))
for theirs, ours in zip(*results):
    assert torch.allclose(theirs, ours, rtol=1e-4, atol=1e-5), (theirs, ours)
assert len(calls) == 8  # scored in one pass; scored, and recomputed in the backward
targets = torch.tensor([0, -1, 69, 3, -1, 5])[:, None] + 1
tile = softmax.Tile(torch.empty(6, 1), Head(torch.empty(71, 1), scale=1.3), targets, slice(1, 71))
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    ours = (torch.randn(6, 70) * 4).to(dtype)
    theirs = ours.clone().float()
    for a, b in zip(fused(ours, tile)[:3], plain(theirs, tile)[:3]):
        assert torch.allclose(a, b, atol=1e-5)
    assert torch.allclose(ours, theirs.to(dtype), atol=1e-2 if dtype != torch.float32 else 1e-6)
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from pullback.ops.triton_kernel import row_softmax
pointers = {"columns": "*i64", **dict.fromkeys(("highest", "total", "one_minus_target", "logits"), "*fp32")}
numbers = {"width": "i32", "stride": "i32", "factor": "fp32", "BLOCK": "constexpr"}
for z in ("*fp32", "*bf16", "*fp16"):
    signature = {name: {**pointers, **numbers, "z": z}[name] for name in row_softmax.arg_names}
    source = triton.compiler.ASTSource(fn=row_softmax, signature=signature, constexprs={"BLOCK": 2048})
    assert "cubin" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm
"""


@needs_triton
@pytest.mark.parametrize(
    "code",
    [
        pytest.param(INTERPRETED, id="interpreted"),
        pytest.param(COMPILED, id="compiled for sm_90", marks=pytest.mark.slow),
    ],
)
def test_kernel(code: str) -> None:
    """It gives what PyTorch's operators give, and compiles to a binary."""
    path = str(Path(softmax.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1" if code is INTERPRETED else "0"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_oracle_is_the_plain_path() -> None:
    """The kernel's oracle gives log-sum-exp, mass without the target and softmax; it is what a CPU runs."""
    z, columns = torch.randn(5, 40) * 3, torch.tensor([0, -1, 39, 7, -1])
    out = z.clone()
    found = softmax.plain_softmax_(out, tile_of(columns))
    p = torch.softmax(0.7 * z, -1)
    assert torch.allclose(found.lse, torch.logsumexp(0.7 * z.double(), -1), atol=1e-6)
    own = torch.where(columns >= 0, p.gather(-1, columns.clamp(min=0)[:, None])[:, 0], 0.0)
    assert torch.allclose(found.one_minus_target.float(), 1 - own, atol=1e-6)
    assert torch.allclose(out.sum(-1), 1 - own, atol=1e-6)
    again = z.clone()
    assert torch.equal(softmax.softmax_(again, tile_of(columns)).lse, found.lse)
    assert torch.equal(again, out)


def tile_of(columns: torch.Tensor) -> softmax.Tile:
    """Return a tile of 40 columns, from the second on, with targets at the given ones (-1: elsewhere)."""
    head = Head(torch.empty(41, 1), scale=0.7)
    return softmax.Tile(torch.empty(len(columns), 1), head, columns[:, None] + 1, slice(1, 41))


def test_a_wrong_kernel_is_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Negative control: the check at first use notices a kernel that is off, and one that cannot run."""
    assert not softmax.is_available(torch.device("cpu"))

    def off(z: torch.Tensor, tile: softmax.Tile) -> softmax.TileSoftmax:
        found = softmax.plain_softmax_(z, tile)
        return found._replace(lse=found.lse + 1e-3)

    monkeypatch.setattr(softmax, "fused_softmax_", off)
    assert not softmax.agrees(torch.device("cpu"))
    monkeypatch.setattr(softmax, "fused_softmax_", softmax.plain_softmax_)
    assert softmax.agrees(torch.device("cpu"))
    monkeypatch.setattr(softmax, "agrees", lambda device: 1 / 0)
    softmax.is_available.cache_clear()
    assert not softmax.is_available(torch.device("cuda", 7))
    softmax.is_available.cache_clear()
    assert "ZeroDivisionError" in caplog.text
    monkeypatch.setattr(softmax, "is_available", lambda device: True)
    hidden, weight, targets = torch.randn(4, 8, requires_grad=True), torch.randn(50, 8), torch.randint(50, (4,))
    logprobs = selected_logprobs(hidden, Head(weight), targets, memory_budget=4 * 4 * 9)
    expected = torch.log_softmax(hidden @ weight.T, -1).gather(-1, targets[:, None])[:, 0]
    assert torch.allclose(logprobs, expected, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad(x.sum(), hidden) for x in (logprobs, expected)), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
