"""Inputs for every registered loss, in every layout, as tensors that a test may change before they become a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pullback.errors import ConfigError
from pullback.losses import AGGREGATIONS, GRPO, KL, ORPO, Loss, TokenBatch, fixed_length, loss_names, registry

__all__ = ["DEFAULTS", "EXTRA", "VARIANTS", "Inputs", "ids", "make"]

_LENGTHS = (5, 3, 4, 6)


def _variants(loss: Loss) -> Iterator[Loss]:
    """Yield the loss with each aggregation that it takes."""
    for aggregation in (*AGGREGATIONS.values(), fixed_length(7.0)):
        try:
            yield dataclasses.replace(loss, aggregation=aggregation)  # type: ignore[type-var]
        except ConfigError:
            continue


DEFAULTS: list[Loss] = [registry.get(name)() for name in loss_names()]
EXTRA: list[Loss] = [
    GRPO(kl=KL()),
    GRPO(clip=None, anchor="none"),
    GRPO(kl=KL("k3", gradient="pathwise", importance=False), aggregation="group_mean_token_mean"),
    GRPO(clip=None, kl=KL("k2", gradient="none")),
    ORPO(nll="token_mean"),
]
VARIANTS: list[Loss] = [*(variant for loss in DEFAULTS for variant in _variants(loss)), *EXTRA]


def ids(losses: list[Loss]) -> list[str]:
    """Return one readable name per loss, for pytest."""
    return [f"{i}-{loss.name}-{loss.main_aggregation.name}" for i, loss in enumerate(losses)]


@dataclass(frozen=True)
class Inputs:
    """What a batch is made of.

    Attributes:
        padded: whether the sequences are rows, or end to end.
        lengths: tokens of each sequence, int64 [B].
        tensors: the log-probs and the other inputs.
    """

    padded: bool
    lengths: Tensor
    tensors: dict[str, Tensor]

    def batch(self, logprobs: Tensor | None = None, lengths: Any = None) -> TokenBatch:
        """Return the batch, with these log-probs in place of its own."""
        rest = dict(self.tensors)
        own = rest.pop("logprobs")
        x = own if logprobs is None else logprobs
        if self.padded:
            return TokenBatch.from_padded(x, rest.pop("weights"), **rest)
        return TokenBatch.from_packed(x, self.lengths if lengths is None else lengths, **rest)

    def mapped(self, change: Callable[[str, Tensor], Tensor]) -> Inputs:
        """Return the inputs with every tensor changed."""
        tensors = {name: change(name, tensor) for name, tensor in self.tensors.items()}
        return replace(self, lengths=change("lengths", self.lengths), tensors=tensors)

    def replaced(self, **tensors: Tensor) -> Inputs:
        """Return the inputs with some others."""
        return replace(self, tensors=self.tensors | tensors)

    @property
    def trained(self) -> Tensor:
        """True where the weight is not 0."""
        return self.tensors["weights"] != 0


def make(
    loss: Loss,
    *,
    padded: bool = False,
    mask: str = "float",
    candidates: int = 0,
    pair_ids: bool = False,
    old: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    lengths: tuple[int, ...] = _LENGTHS,
) -> Inputs:
    """Return inputs that a loss reads: random numbers, a first token of each sequence that is not trained.

    Args:
        loss: which fields are filled is its to say.
        padded: the layout.
        mask: ``float`` (0, 0.5, 1, 2), ``ones`` (0 and 1) or ``bool``.
        candidates: K, for soft targets; 0 for one target per token.
        pair_ids: pairs by ``pair_id`` and ``role``, in no order; else neighbours.
        old: give ``old_logprobs`` too.
        dtype: of the log-probs; the other inputs are float32, or float64 with it.
        seed: of the random numbers.
        lengths: tokens of each sequence.
    """
    rng = torch.Generator().manual_seed(seed)
    shape: tuple[int, ...] = (len(lengths), max(lengths)) if padded else (sum(lengths),)
    shape = (*shape, candidates) if candidates else shape
    inner = torch.float64 if dtype == torch.float64 else torch.float32

    def uniform(low: float, high: float) -> Tensor:
        return (torch.rand(shape, generator=rng, dtype=torch.float64) * (high - low) + low).to(inner)

    logprobs = uniform(-3.0, -0.2)
    fields = {"logprobs": logprobs.to(dtype), "weights": _weights(mask, shape, lengths, padded, rng, inner)}
    wanted = {"rollout_logprobs" if key == "logprobs" else key for key in loss.required_inputs + loss.optional_inputs}
    for name in ("rollout_logprobs", "old_logprobs", "ref_logprobs"):
        if name in wanted and (old or name != "old_logprobs"):
            fields[name] = (logprobs + uniform(-0.4, 0.4)).clamp(max=0.0)
    if "advantages" in wanted:
        fields["advantages"] = uniform(-2.0, 2.0)
    count = len(lengths)
    if "group_id" in wanted:
        fields["group_id"] = torch.arange(count) * 7 % 3
    if "label" in wanted:
        fields["label"] = torch.arange(count) % 2
    if "reference_point" in wanted:
        fields["reference_point"] = torch.arange(count) % 3 * torch.tensor(0.25, dtype=inner)
    if pair_ids and "pair_id" in wanted:
        order = torch.randperm(count, generator=rng)
        fields |= {"pair_id": 11 - order // 2, "role": order % 2}
    return Inputs(padded, torch.tensor(lengths), fields)


def _weights(
    mask: str, shape: tuple[int, ...], lengths: tuple[int, ...], padded: bool, rng: torch.Generator, dtype: torch.dtype
) -> Tensor:
    """Return weights: 0 on padding and on the first token of each sequence, not 0 on the second."""
    numbers = torch.tensor([1.0, 0.5, 2.0, 0.0]) if mask == "float" else torch.tensor([1.0, 1.0, 1.0, 0.0])
    chosen = numbers[torch.randint(4, shape, generator=rng)]
    if padded:
        chosen[:, 0], chosen[:, 1] = 0.0, 1.0
        for row, length in enumerate(lengths):
            chosen[row, length:] = 0.0
    else:
        starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
        chosen[starts], chosen[starts + 1] = 0.0, 1.0
    return chosen.bool() if mask == "bool" else chosen.to(dtype)
