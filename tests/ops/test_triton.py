"""The Triton row pass: PyTorch's result, through Triton's interpreter, and a binary for a GPU that need not be there."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pullback.backends import Head, selected_logprobs
from pullback.ops import fused, online

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton (Linux)")

INTERPRETED = """
import torch
from pullback.backends import Head, selected_logprobs
from pullback.ops import fused, online
assert fused.agrees(torch.device("cpu"))
hidden, weight = torch.randn(9, 16, requires_grad=True), torch.randn(300, 16)
targets = torch.randint(300, (9,))
results, calls = [], []
online.fused_rows = lambda *call: (calls.append(1), fused.fused_rows(*call))[1]
for kernel in (False, True):
    online.is_available = lambda device: kernel
    logprobs = selected_logprobs(hidden, Head(weight, scale=0.5), targets, temperature=0.7, memory_budget=4 * 9 * 64)
    results.append((logprobs, torch.autograd.grad(logprobs.sum(), hidden)[0]))
for plain, ours in zip(*results):
    assert torch.allclose(plain, ours, rtol=1e-4, atol=1e-5), (plain, ours)
assert len(calls) == 5  # tiles of 64 columns
tile, column = torch.randn(6, 70) * 4, torch.tensor([0, -1, 69, 3, -1, 5])
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    outs = [torch.empty(6, 70, dtype=dtype) for _ in range(2)]
    found = fused.fused_rows(tile.clone(), outs[0], column, 1.3)
    expected = fused.plain_rows(tile.clone(), outs[1], column, 1.3)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected))
    assert torch.allclose(*outs, atol=1e-2 if dtype != torch.float32 else 1e-6)
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from pullback.ops.triton_kernel import rows
pointers = {"z": "*fp32", "columns": "*i64", "highest": "*fp32", "total": "*fp32", "others": "*fp32", "chosen": "*fp32"}
numbers = {"width": "i32", "z_stride": "i32", "out_stride": "i32", "factor": "fp32", "BLOCK": "constexpr"}
for out in ("*fp32", "*bf16", "*fp16"):
    signature = {name: {**pointers, **numbers, "out": out}[name] for name in rows.arg_names}
    source = triton.compiler.ASTSource(fn=rows, signature=signature, constexprs={"BLOCK": 2048})
    assert "cubin" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm
"""


@needs_triton
@pytest.mark.parametrize("code", [INTERPRETED, COMPILED], ids=["interpreted", "compiled for sm_90"])
def test_kernel(code: str) -> None:
    """It gives what PyTorch's operators give, and compiles to a binary."""
    path = str(Path(fused.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1" if code is INTERPRETED else "0"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_oracle_is_the_plain_path() -> None:
    """The kernel's oracle gives the log-sum-exp, the mass without the target and the softmax that the plain path uses."""
    z, columns = torch.randn(5, 40) * 3, torch.tensor([0, -1, 39, 7, -1])
    out = torch.empty_like(z)
    found = fused.plain_rows(z.clone(), out, columns, 0.7)
    p = torch.softmax(0.7 * z, -1)
    assert torch.allclose(found.lse, torch.logsumexp(0.7 * z.double(), -1), atol=1e-6)
    own = torch.where(columns >= 0, p.gather(-1, columns.clamp(min=0)[:, None])[:, 0], 0.0)
    assert torch.allclose(found.mass.float(), 1 - own, atol=1e-6)
    assert torch.allclose(out.sum(-1), 1 - own, atol=1e-6)


def test_a_wrong_kernel_is_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Negative control: the check at first use notices a kernel that is off, and one that cannot run."""
    assert not fused.is_available(torch.device("cpu"))

    def off(z: torch.Tensor, out: torch.Tensor, columns: torch.Tensor, factor: float) -> fused.FusedRows:
        found = fused.plain_rows(z, out, columns, factor)
        return found._replace(lse=found.lse + 1e-3)

    monkeypatch.setattr(fused, "fused_rows", off)
    assert not fused.agrees(torch.device("cpu"))
    monkeypatch.setattr(fused, "fused_rows", fused.plain_rows)
    assert fused.agrees(torch.device("cpu"))
    monkeypatch.setattr(fused, "agrees", lambda device: 1 / 0)
    fused.is_available.cache_clear()
    assert not fused.is_available(torch.device("cuda", 7))
    fused.is_available.cache_clear()
    assert "ZeroDivisionError" in caplog.text
    monkeypatch.setattr(online, "is_available", lambda device: True)
    monkeypatch.setattr(online, "fused_rows", fused.plain_rows)
    hidden, weight, targets = torch.randn(4, 8, requires_grad=True), torch.randn(50, 8), torch.randint(50, (4,))
    logprobs = selected_logprobs(hidden, Head(weight), targets, memory_budget=4 * 4 * 9)
    expected = torch.log_softmax(hidden @ weight.T, -1).gather(-1, targets[:, None])[:, 0]
    assert torch.allclose(logprobs, expected, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad(x.sum(), hidden) for x in (logprobs, expected)), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
