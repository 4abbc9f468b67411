"""What is asked of two processes, one of which fails, or is given something else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Final, Self, final
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from pullback.backends import AdamParams, TorchBackend
from pullback.backends.native.execution.gradient import streams_in_one_pass
from pullback.backends.types import SamplingParams
from pullback.datums import Datum, ModelInput
from pullback.losses import CrossEntropy, Loss, TokenBatch
from pullback.losses.evaluation.terms import Summand
from pullback.testing import TinyLM, example_datums
from pullback.testing.models import tiny
from pullback.testing.models.tiny import causal_mask

__all__ = [
    "BAD",
    "CASES",
    "DATA",
    "NEXT",
    "PARAMS",
    "PATIENCE",
    "SECONDS",
    "WORKS",
    "Planted",
    "make",
    "on_one",
    "only_on",
    "out_of_memory",
    "summed",
    "with_token",
]


PARAMS: Final = AdamParams(learning_rate=1e-2, grad_clip_norm=1.0)
SECONDS: Final = 8.0  # that a process waits where another one is lost
PATIENCE: Final = 120.0  # that it waits where none is: nobody waits so long
DATA: Final = example_datums([9, 5, 12, 3, 7, 11, 4, 8])
NEXT: Final = example_datums([6, 10, 5, 7], seed=1)


def make(folder: Path, timeout: float = PATIENCE, **options: Any) -> TorchBackend:
    return TorchBackend(TinyLM(tied=True), token_budget=16, timeout=timeout, checkpoint_dir=folder, **options)


def summed(data: Sequence[Any], logprobs: list[Tensor]) -> tuple[Tensor, Mapping[str, float]]:
    return -torch.stack([x.sum() for x in logprobs]).exp().sum(), {}


def raising_on(rank: int) -> Callable[..., tuple[Tensor, Mapping[str, float]]]:
    def loss(data: Sequence[Any], logprobs: list[Tensor]) -> tuple[Tensor, Mapping[str, float]]:
        if dist.get_rank() == rank:
            raise ValueError("no such reward")
        return summed(data, logprobs)

    return loss


@dataclass(frozen=True)
class Planted(Loss):
    """What the registered losses of these tests declare: they are cross-entropy, except for what each does to its terms."""

    gradient_kind: ClassVar[Any] = "token"
    sources: ClassVar[tuple[str, ...]] = ("this test",)
    required_inputs: ClassVar[tuple[str, ...]] = ()
    optional_inputs: ClassVar[tuple[str, ...]] = ("weights",)
    aggregation: str = "sum"

    @classmethod
    def from_config(cls) -> Self:
        return cls()


@final
@dataclass(frozen=True)
class Strict(Planted):
    """It fails on rank 1, once it is told to, at the first tokens that it is asked about."""

    fails: ClassVar[bool] = False
    name: ClassVar[str] = "strict"

    def terms(self, batch: TokenBatch) -> tuple[Summand, ...]:
        if self.fails and dist.get_rank() == 1:
            raise ValueError("no such token")
        return CrossEntropy().terms(batch)


def registered_raises(backend: TorchBackend) -> Any:
    """A registered loss that fails between a forward and its backward, in the one pass of a trained head."""
    assert streams_in_one_pass(backend._native.model, backend._prepare(DATA, Strict(), by_name=True))
    with mock.patch.object(Strict, "fails", True):
        return backend.forward_backward(DATA, Strict())


def random(data: Sequence[Any], logprobs: list[Tensor]) -> tuple[Tensor, Mapping[str, float]]:
    factor = torch.rand((), generator=torch.Generator().manual_seed(dist.get_rank()))
    return factor * torch.cat(logprobs).sum(), {}


@contextmanager
def out_of_memory(times: int, after: int = 0) -> Iterator[None]:
    """Let the model's forward on this process run out of memory."""
    calls = iter(range(10**6))

    def mask(positions: Tensor) -> Tensor:
        if after <= next(calls) < after + times:
            raise torch.OutOfMemoryError("CUDA out of memory: planted")
        return causal_mask(positions)

    with mock.patch.object(tiny, "causal_mask", mask):
        yield


@contextmanager
def only_on(rank: int, what: Callable[[], Any]) -> Iterator[None]:
    if dist.get_rank() != rank:
        yield
        return
    with what():
        yield


def on_one(there: Any, here: Any) -> Any:
    """Return one thing on rank 1, another on rank 0."""
    return there if dist.get_rank() == 1 else here


def with_token(data: Sequence[Datum], at: int, token: int | None = None) -> list[Datum]:
    """Change the last token of a datum."""
    changed = list(data)
    before = data[at].model_input.to_ints()
    tokens = [*before[:-1], (before[-1] + 1) % 17 if token is None else token]
    changed[at] = Datum(ModelInput.from_ints(tokens), data[at].loss_fn_inputs)
    return changed


def asked_inside(backend: TorchBackend) -> Any:
    """A loss that asks for a forward, which fails on rank 1."""

    def loss(data: Sequence[Any], logprobs: list[Tensor]) -> tuple[Tensor, Mapping[str, float]]:
        backend.forward(on_one(with_token(DATA, 0, 99), DATA)).result()
        return summed(data, logprobs)

    return backend.forward_backward_custom(DATA, loss)


def unwritable(backend: TorchBackend) -> Any:
    """A checkpoint below what is a file."""
    root = backend._native.directory / "file"
    root.write_text("")
    return backend.save_weights("x", folder=root / "below")


def in_float16(backend: TorchBackend, ranks: Sequence[int], call: Callable[..., Any], *arguments: Any) -> Any:
    """Ask under an autocast on some ranks."""
    with torch.autocast("cpu", torch.float16, enabled=dist.get_rank() in ranks):
        return call(backend, DATA, *arguments)


def prompts(*tokens: int) -> list[ModelInput]:
    return [ModelInput.from_ints(tokens)]


FEW: Final = SamplingParams(max_tokens=3)
BAD: Final = with_token(DATA, 2, 99)

# What is asked of each rank; it must fail on both.
CASES: Final[dict[str, Callable[[TorchBackend], Any]]] = {
    "loss raises": lambda b: b.forward_backward_custom(DATA, raising_on(1)),
    "registered loss raises": registered_raises,
    "loss raises on rank 0": lambda b: b.forward_backward_custom(DATA, raising_on(0)),
    "invalid data": lambda b: b.forward_backward(on_one(BAD, DATA), "ppo"),
    "no data": lambda b: b.forward_backward(on_one([], DATA), "ppo"),
    "other tokens": lambda b: b.forward_backward(on_one(with_token(DATA, 5), DATA), "ppo"),
    "fewer datums": lambda b: b.forward_backward(on_one(DATA[:4], DATA), "ppo"),
    "other order": lambda b: b.forward(on_one(DATA[::-1], DATA)),
    "other loss": lambda b: b.forward_backward(DATA, on_one("ppo", "cross_entropy")),
    "other hyperparameters": lambda b: b.forward_backward(DATA, "ppo", {"clip_low_threshold": on_one(0.7, 0.8)}),
    "other counts": lambda b: b.forward_backward(DATA, "grpo", counts={"tokens": on_one(9, 10)}),
    "other AdamParams": lambda b: b.optim_step(AdamParams(learning_rate=on_one(2e-2, 1e-2))),
    "other normalization": lambda b: b.optim_step(PARAMS, on_one(None, "num_sequences")),
    "other operation": lambda b: on_one(b.forward_backward, b.forward)(DATA, "ppo"),
    "step against forward": lambda b: b.optim_step(PARAMS) if dist.get_rank() else b.forward(DATA),
    "sample against forward": lambda b: b.sample(prompts(1, 2), 1, FEW) if dist.get_rank() else b.forward(DATA),
    "other prompts": lambda b: b.sample(prompts(1, on_one(2, 3)), 1, FEW),
    "other checkpoint": lambda b: b.save_state(on_one("a", "b")),
    "unwritable folder": unwritable,
    "random loss": lambda b: b.forward_backward_custom(DATA, random),
    "forward inside a loss": asked_inside,
    "forward_retain": lambda b: b.forward_retain(on_one(BAD, DATA)),
    "float16 on one rank": lambda b: in_float16(b, (1,), TorchBackend.forward_backward, "ppo"),
    "float16": lambda b: in_float16(b, (0, 1), TorchBackend.forward_backward, "ppo"),
    "float16, retained": lambda b: in_float16(b, (0, 1), TorchBackend.forward_retain),
}


def starved_inside(backend: TorchBackend) -> Any:
    """A loss that asks for a forward, which runs out of memory once on rank 1."""

    def loss(data: Sequence[Any], logprobs: list[Tensor]) -> tuple[Tensor, Mapping[str, float]]:
        with only_on(1, partial(out_of_memory, 1)):
            backend.forward(NEXT).result()
        return summed(data, logprobs)

    return backend.forward_backward_custom(DATA, loss).result()


WORKS: Final[dict[str, Callable[[TorchBackend], Any]]] = {
    "forward": lambda b: b.forward(DATA).result(),
    "streamed": lambda b: b.forward_backward(DATA, "ppo").result(),
    "function": lambda b: b.forward_backward_custom(DATA, summed).result(),
    "inside a loss": starved_inside,
    "retained": lambda b: b.backward({b.forward_retain(DATA).result(): range(len(DATA))}, DATA, "ppo").result(),
}
