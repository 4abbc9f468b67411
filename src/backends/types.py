"""What goes into and comes out of a backend's operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Final, Self, cast, final

import torch
from torch import Tensor

from ..datums.types import TensorData
from ..errors import ConfigError, suggestion
from .sampling_params import SamplingParams

__all__ = [
    "AdamParams",
    "ForwardBackwardOutput",
    "LedgerEntry",
    "OptimStepOutput",
    "Plan",
    "Rollout",
    "SamplingParams",
    "SaveStateOutput",
]

_LARGEST: Final = 1e20  # of an optimizer's parameters: a step of it, bias correction included, is a number in fp32
_SMALLEST_EPS: Final = float(torch.finfo(torch.float32).tiny)
_ELSEWHERE: Final = {  # what torch and trainers call fields of AdamParams
    "lr": "learning_rate=...",
    "betas": "beta1=..., beta2=...",
    "epsilon": "eps=...",
    "max_grad_norm": "grad_clip_norm=...",
}


@final
@dataclass(frozen=True)
class AdamParams:
    """Hyperparameters of one AdamW step, with the Tinker fields and defaults.

    Args:
        learning_rate: step size.
        beta1, beta2: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay.
        grad_clip_norm: largest gradient norm, after normalisation; 0 = no clipping.

    Raises:
        ConfigError: a field is no number, or out of range: it must be finite and small enough for a step in fp32.
        TypeError: there is no such field; says what torch's or a trainer's name for one is called here.
    """

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0

    def __new__(cls, *_: object, **given: object) -> Self:
        """Refuse a keyword that is no field, in words."""
        for name in given:
            if name not in cls.__annotations__:
                meant = f": write {_ELSEWHERE[name]}" if name in _ELSEWHERE else suggestion(name, cls.__annotations__)
                raise TypeError(f"AdamParams has no {name!r}{meant}; it has: {', '.join(cls.__annotations__)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps", "weight_decay", "grad_clip_norm"):
            value = _number(name, getattr(self, name))
            if not 0.0 <= value <= _LARGEST:
                raise ConfigError(f"{name} must be finite and at least 0, {_LARGEST:g} at most, got {value!r}")
        for name in ("beta1", "beta2"):
            if not 0.0 <= _number(name, getattr(self, name)) < 1.0:
                raise ConfigError(f"{name} must be in [0, 1), got {getattr(self, name)!r}")
        if self.learning_rate * self.weight_decay > _LARGEST:
            raise ConfigError(
                f"learning_rate times weight_decay must be {_LARGEST:g} at most: the weights are multiplied by it"
            )
        if self.eps < _SMALLEST_EPS:
            raise ConfigError(
                f"eps must be at least {_SMALLEST_EPS:.2g}, got {self.eps!r}: in fp32 it is 0, and the step of a weight "
                "whose gradient is 0 would be 0 / 0"
            )


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ConfigError(f"{name} must be a number, got {value!r}")
    return cast(float, value)


@final
@dataclass(frozen=True)
class Rollout:
    """One sampled completion.

    Attributes:
        prompt_index: which prompt it belongs to.
        tokens: the completion, the stop token included.
        logprobs: log-prob of each token under the untempered policy (what ``forward`` says at temperature 1).
        stop_reason: ``stop`` or ``length``.
        weights_version: optimizer steps the sampler had seen.
        temperature, top_p, top_k: how it was drawn.
        sampler_logprobs: log-prob of each token under the tempered policy, not cut: what ``forward`` says of a datum with
            this temperature; None where the sampler does not tell.
    """

    prompt_index: int
    tokens: list[int]
    logprobs: list[float]
    stop_reason: str
    weights_version: int
    temperature: float
    top_p: float
    top_k: int
    sampler_logprobs: list[float] | None = None


@final
@dataclass(frozen=True)
class ForwardBackwardOutput:
    """Result of ``forward``, ``forward_backward`` and ``forward_backward_custom``.

    Attributes:
        loss_fn_outputs: one dict per datum, in the order of the data: ``logprobs`` (shape of the targets) and, where
            positions were skipped, ``scored`` (1 where the log-prob was computed, 0 where it reads 0.0).
        metrics: ``{"name:reduction": value}``; a custom function's own names as it gave them.
        loss_fn_output_type: the protocol's name of the form.
    """

    loss_fn_outputs: Sequence[Mapping[str, TensorData]]
    metrics: Mapping[str, float]
    loss_fn_output_type: str = "ArrayRecord"

    @classmethod
    def of(cls, logprobs: Sequence[Tensor], metrics: Mapping[str, float]) -> Self:
        """Return the result of a call that scored every position."""
        return cls([{"logprobs": TensorData(x)} for x in logprobs], metrics)


@final
@dataclass(frozen=True)
class LedgerEntry:
    """One gradient operation of an accumulation.

    Attributes:
        operation: number of the operation, from 1.
        loss: name of the loss or function.
        datums: how many.
        tokens: tokens with a non-zero cotangent.
        sequences: sequences with such a token.
        denominator: what the gradient waits to be divided by (``none`` if nothing).
        count: this call's share of that denominator.
    """

    operation: int
    loss: str
    datums: int
    tokens: int
    sequences: int
    denominator: str
    count: float


@final
@dataclass(frozen=True)
class OptimStepOutput:
    """Result of ``optim_step``.

    Attributes:
        metrics: ``grad_norm`` (after normalisation, before clipping), ``divided_by``, ``learning_rate``.
        stepped: False if nothing had accumulated; then nothing changed.
        divided_by: the one number the summed gradient was divided by.
        normalization: in words, e.g. ``token_mean over 7 calls``.
        ledger: what had accumulated.
    """

    metrics: Mapping[str, float]
    stepped: bool
    divided_by: float
    normalization: str
    ledger: Sequence[LedgerEntry] = field(default_factory=tuple)

    @classmethod
    def empty(cls, divided_by: float, ledger: Sequence[LedgerEntry]) -> Self:
        """Return the result of a step that had nothing to step on."""
        reason = "empty accumulation: no token has a gradient, so no step was made"
        return cls({"tokens": 0.0}, False, divided_by, reason, ledger)


@final
@dataclass(frozen=True)
class SaveStateOutput:
    """Where a checkpoint was written."""

    path: str


@final
@dataclass(frozen=True)
class Plan:
    """What a backend would do with a loss and data; nothing has run.

    Attributes:
        route: ``native`` (registered loss, streamed), ``single_pass`` (function of all log-probs, one forward),
            ``two_passes`` (the same beyond the memory budget: some forwards of the base model are recomputed) or ``refuse``.
        reason: why.
        micro_batches: datum indices of each forward.
        layout: ``packed``, ``padded`` or ``single``.
        tokens: tokens that go through the base model, padding included.
        scored: positions that go through the head.
        recomputed: tokens that run through it a second time.
        forward_flops, backward_flops: estimate, from the matrix products; a second run counts as backward.
        graph_bytes: estimate of what the graphs hold at most, from the micro-batch last measured.
        peak_bytes: that, with what the head and the gradients need, beside the weights and the optimizer.
        rank_bytes: what this one of several processes holds, by part and in ``total`` (docs/memory.md); empty on one.
        bytes_moved: what it receives from others if the step is this call, likewise.
    """

    route: str
    reason: str
    micro_batches: Sequence[Sequence[int]] = ()
    layout: str = "padded"
    tokens: int = 0
    scored: int = 0
    recomputed: int = 0
    forward_flops: float = 0.0
    backward_flops: float = 0.0
    graph_bytes: float = 0.0
    peak_bytes: float = 0.0
    rank_bytes: Mapping[str, float] = field(default_factory=dict)
    bytes_moved: Mapping[str, float] = field(default_factory=dict)


def as_mapping(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a loss config as a dict, refusing tensors: per-token inputs belong into the datums.

    Raises:
        ConfigError: it is no mapping, or a value is a tensor or list.
    """
    if config is None:
        return {}
    if not isinstance(config, Mapping):
        raise ConfigError(
            f"loss_fn_config must be a mapping of names to numbers and strings, got {type(config).__name__}"
        )
    for key, value in config.items():
        if isinstance(value, (Tensor, list, tuple, dict)):
            raise ConfigError(
                f"loss_fn_config[{key!r}] is a {type(value).__name__}; per-token inputs belong into the datums"
            )
    return dict(config)
