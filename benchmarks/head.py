"""The head alone, forward and backward: bare products, textbook, PyTorch's and others' fused losses, ours."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pullback.ops import Head, logprob_surrogate, selected_logprobs

from .timing import Report, interleave, peak_bytes

__all__ = ["run"]

SHAPES = {"smollm2": (4096, 576, 49152), "qwen": (2048, 1024, 151936), "small": (512, 64, 8192)}
CHUNKS = (256, 512, 1024, 2048)


class Case:
    """Inputs of one shape, and every way to get d(sum g logprob) of them."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, trained: bool, device: str) -> None:
        n, width, vocab = shape
        generator = torch.Generator().manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator).to(device, dtype)

        self.hidden = normal(n, width).requires_grad_()
        self.weight = (normal(vocab, width) / width**0.5).requires_grad_(trained)
        self.targets = torch.randint(vocab, (n,), generator=generator).to(device)
        self.cotangent = torch.randn(n, generator=generator).to(device)
        self.half = (torch.arange(n) % 2 == 0).to(device)
        self.trained = trained

    def bare(self) -> None:
        """The matrix products and nothing else."""
        with torch.no_grad():
            z = self.hidden @ self.weight.T
            z @ self.weight
            if self.trained:
                z.T @ self.hidden

    def pull(self, logprobs: Tensor) -> None:
        self.hidden.grad = self.weight.grad = None
        torch.autograd.backward((logprobs.float() * self.cotangent).sum())

    def logits(self) -> Tensor:
        product: Tensor = self.hidden @ self.weight.T
        return product.float()

    def log_softmax(self) -> None:
        """The textbook."""
        self.pull(torch.log_softmax(self.logits(), -1).gather(-1, self.targets[:, None])[:, 0])

    def logsumexp(self) -> None:
        """One logit minus logsumexp."""
        logits = self.logits()
        self.pull(logits.gather(-1, self.targets[:, None])[:, 0] - torch.logsumexp(logits, -1))

    def ours(self) -> None:
        """`selected_logprobs`."""
        self.pull(selected_logprobs(self.hidden, Head(self.weight), self.targets))

    def half_needed(self) -> None:
        """`selected_logprobs` where every second position is untrained."""
        self.pull(selected_logprobs(self.hidden, Head(self.weight), self.targets, needed=self.half))

    def one_pass(self) -> None:
        """`logprob_surrogate`."""
        self.hidden.grad = self.weight.grad = None
        value, _ = logprob_surrogate(self.hidden, Head(self.weight), self.targets, self.cotangent)
        torch.autograd.backward(value)

    def torch_chunked(self, size: int) -> None:
        """PyTorch's own, without reduction, so that any cotangent can follow."""
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=size, chunking_method=None)
        self.pull(
            -functional.linear_cross_entropy(self.hidden, self.weight, self.targets, reduction="none", options=options)
        )

    def cce(self, implementation: str) -> None:
        """Apple's cut-cross-entropy."""
        from cut_cross_entropy import linear_cross_entropy

        self.pull(-linear_cross_entropy(self.hidden, self.weight, self.targets, impl=implementation, reduction="none"))

    def liger(self) -> None:
        """Liger's fused loss: only for a mean (its cotangent is a constant), and only on a GPU."""
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        self.hidden.grad = self.weight.grad = None
        torch.autograd.backward(liger_fused_linear_cross_entropy(self.hidden, self.weight, self.targets))


def works(case: Case, device: str, only: Sequence[str]) -> dict[str, Callable[[], Any]]:
    """Return what runs here, by name; ``only`` keeps those whose names contain one of these words, and the baseline."""

    def selected(name: str) -> bool:
        return not only or name == "bare products" or any(word in name for word in only)

    cases: dict[str, Callable[[], Any]] = {
        "bare products": case.bare,
        "selected_logprobs": case.ours,
        "selected_logprobs, half needed": case.half_needed,
        "log_softmax + gather": case.log_softmax,
        "logsumexp": case.logsumexp,
    }
    if case.trained:
        cases["logprob_surrogate"] = case.one_pass
    if hasattr(functional, "linear_cross_entropy") and case.hidden.dtype == torch.float32 and selected("torch linear"):
        best = min(CHUNKS, key=lambda size: interleave({"": lambda: case.torch_chunked(size)}, 1, "cpu").seconds[""][0])
        cases[f"torch linear_cross_entropy ({best})"] = lambda: case.torch_chunked(best)
    if importlib.util.find_spec("cut_cross_entropy") is not None:
        implementation = "cce_exact" if device == "cuda" else "torch_compile"  # its kernels need a GPU
        cases[f"cut-cross-entropy ({implementation})"] = lambda: case.cce(implementation)
    if device == "cuda" and importlib.util.find_spec("liger_kernel") is not None:
        cases["liger (mean only)"] = case.liger
    return {name: work for name, work in cases.items() if selected(name)}


def run(arguments: Any) -> None:
    """Time every shape, dtype and kind of head."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    report = Report("head")
    for name in arguments.shapes.split(","):
        for dtype in arguments.dtypes.split(","):
            for trained in (kind == "trained" for kind in arguments.heads.split(",")):
                shape = (arguments.positions or SHAPES[name][0], *SHAPES[name][1:])
                case = Case(shape, getattr(torch, dtype), trained, device)
                cases = works(case, device, arguments.only)
                times = interleave(cases, arguments.rounds, arguments.clock)
                peaks = {label: peak_bytes(work) for label, work in cases.items()}
                kind = "trained head" if trained else "frozen head"
                facts = {"fp32_logits_mb": round(4 * shape[0] * shape[2] / 1e6)}
                report.add(f"{name} {shape} {dtype} {kind}", times, "bare products", facts, peaks)
    report.close()
