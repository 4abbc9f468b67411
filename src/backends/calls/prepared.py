"""A call, checked and taken apart once: the object that travels from a backend's verb through its engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, final

import torch
from torch import Tensor

from ...datums.types import Datum, TensorData
from ...datums.validation import validate
from ...errors import InvalidDatumsError, LossTypeError, UnsupportedError
from ...losses.base import GradientKind, Loss
from ...losses.batch.adapt import as_tensor
from ...losses.batch.token_batch import TokenBatch
from ...losses.counts import Counts, check_counts
from ...losses.evaluation.metrics import wire_metrics
from ...losses.kind import trusted_kind
from ..operations.lock import running_loss
from ..protocol import CustomLoss
from ..types import ForwardBackwardOutput
from .losses import loss_name, needed_inputs
from .requests import Positions, ScoreRequest
from .units import by_group, loss_units

__all__ = ["PreparedCall", "prepare"]


@final
@dataclass(frozen=True, eq=False)
class PreparedCall:
    """The data of one call, its loss, and all that follows from the two.

    Attributes:
        data: datums that have passed validation.
        loss: a registered loss, or a function ``(data, logprobs_list) -> (loss, metrics)``.
        counts: totals of the whole step by denominator: the loss divides now; None: it is divided later, or not at all.
        requests: what is scored of each datum.
        by_name: the loss was asked for as one that the backend knows (``forward_backward``).
        gradient_kind: what a token's gradient can be relied on to depend on.
        weights: that are trained here, by name; a function may depend on them through the log-probs only.
    """

    data: Sequence[Datum]
    loss: Loss | CustomLoss
    counts: Mapping[str, float] | None
    requests: Sequence[ScoreRequest]
    by_name: bool = True
    gradient_kind: GradientKind = "batch"
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    _packed: dict[tuple[int, ...], TokenBatch] = field(default_factory=dict)

    @property
    def registered(self) -> Loss | None:
        """The loss, if it is no mere function."""
        return self.loss if isinstance(self.loss, Loss) else None

    @property
    def needs_all_datums(self) -> bool:
        """Whether the loss can be evaluated only on the log-probs of the whole call."""
        return self.registered is None or self.gradient_kind == "batch"

    @property
    def name(self) -> str:
        """Of the loss or function."""
        return loss_name(self.loss)

    @property
    def described(self) -> str:
        """The loss with its hyperparameters; empty for a function."""
        return "" if self.registered is None else repr(self.registered)

    @property
    def denominator(self) -> str:
        """What the gradient waits to be divided by; ``none`` where that is nothing, or ``counts`` are given."""
        if self.registered is None or self.counts is not None:
            return "none"
        return self.registered.main_aggregation.denominator

    @property
    def declared_normalization(self) -> str | None:
        """The normalisation that fits the loss: None for a mean, ``function`` where nobody says."""
        return "function" if self.registered is None else self.registered.normalization

    @cached_property
    def groups(self) -> frozenset[int]:
        """Ids of the prompt groups, where the loss takes a mean over groups or within each."""
        if self.registered is None or not by_group(self.registered):
            return frozenset()
        return frozenset(int(as_tensor(datum.loss_fn_inputs["group_id"])) for datum in self.data)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each datum as it is scored."""
        return [request.length for request in self.requests]

    @cached_property
    def units(self) -> list[list[int]]:
        """Datums that must stay together: pairs, groups, the whole call, or single datums (a function sees all anyway)."""
        if self.registered is None:
            return [[i] for i in range(len(self.data))]
        return loss_units(self.registered, self.gradient_kind, self.data)

    def batch(self, members: Sequence[int], logprobs: Tensor) -> TokenBatch:
        """Return the tensors that the registered loss reads of some datums; these are packed once.

        Args:
            members: datum indices.
            logprobs: theirs, end to end.
        """
        assert isinstance(self.loss, Loss), "functions take datums"
        key = tuple(members)
        if key not in self._packed:
            apart = torch.split(logprobs.detach(), [self.requests[i].length for i in members])
            self._packed[key] = self.loss.batch([self.data[i] for i in members], apart)
        return self._packed[key].with_logprobs(logprobs)

    def evaluated(self, logprobs: Sequence[Tensor]) -> ForwardBackwardOutput:
        """Return the result of a call that only scores, with what its registered loss reports."""
        assert isinstance(self.loss, Loss), "functions are not evaluated without a gradient"
        batch = self.batch(range(len(self.data)), torch.cat([x.detach() for x in logprobs]))
        with running_loss():
            found = self.loss.undivided(batch)
        return self.output(logprobs, wire_metrics(found.metrics))

    def require_untempered(self) -> None:
        """Check that everything is scored at temperature 1.

        Raises:
            UnsupportedError: a datum names another temperature.
        """
        tempered = [i for i, request in enumerate(self.requests) if request.temperature != 1.0]
        if tempered:
            raise UnsupportedError(
                f"datums {tempered} were sampled at another temperature than 1, at which this backend cannot score; sample at "
                "temperature 1, or train on a backend that can (TorchBackend)"
            )

    def output(self, logprobs: Sequence[Tensor], metrics: Mapping[str, float]) -> ForwardBackwardOutput:
        """Return the call's result; where positions were skipped it says so in ``scored``."""
        outputs = []
        for request, values in zip(self.requests, logprobs, strict=True):
            output = {"logprobs": TensorData(values.detach())}
            if not bool(request.needed.all()):
                output["scored"] = TensorData(request.needed.to(torch.float32))
            outputs.append(output)
        return ForwardBackwardOutput(outputs, {**metrics, **self._provenance()})

    def _provenance(self) -> dict[str, float]:
        """How many rollouts were drawn from a cut distribution, whose ratios are biased."""
        cuts = [datum.loss_fn_inputs["top_p"].data[0] for datum in self.data if "top_p" in datum.loss_fn_inputs]
        cut = sum(1 for top_p in cuts if top_p != 1.0)
        return {"rollouts_cut:sum": float(cut)} if cut else {}


def prepare(
    data: Sequence[Datum],
    loss: Loss | CustomLoss | None,
    *,
    counts: Counts | None = None,
    positions: Positions = "all",
    vocab_size: int | None = None,
    max_length: int | None = None,
    by_name: bool = True,
    weights: Mapping[str, Tensor] = MappingProxyType({}),
) -> PreparedCall:
    """Check a call and take it apart.

    Args:
        data: datums.
        loss: a registered loss, or a function, which says nothing of the inputs that it reads; None: only score.
        counts: see `PreparedCall`.
        positions: which positions are scored; ``trained`` leaves out those of weight 0.
        vocab_size: token ids are below it.
        max_length: longest model input, tokens.
        by_name, weights: see `PreparedCall`.

    Raises:
        InvalidDatumsError: lists all problems of all datums.
        LossTypeError: the loss cannot be called.
    """
    if loss is not None and not callable(loss):
        raise LossTypeError(f"loss_fn must be a function (data, logprobs_list) -> (loss, metrics), got {loss!r}")
    check_counts(counts)
    registered = loss if isinstance(loss, Loss) else None
    validate(
        data,
        required=() if registered is None else needed_inputs(registered),
        optional=() if registered is None else registered.optional_inputs,
        vocab_size=vocab_size,
        max_length=max_length,
        known_keys=registered is not None,
        pairs=registered is not None and registered.gradient_kind == "pair",
    )
    requests = [ScoreRequest.of(datum, positions) for datum in data]
    _require_same_candidates(requests)
    totals = None if counts is None else {name: float(total) for name, total in counts.items()}
    with running_loss():  # measuring evaluates it
        kind: GradientKind = "batch" if registered is None else trusted_kind(registered)
    return PreparedCall(data, _no_loss if loss is None else loss, totals, requests, by_name, kind, weights)


def _require_same_candidates(requests: Sequence[ScoreRequest]) -> None:
    shapes = [tuple(request.targets.shape[1:]) for request in requests]
    words = "datum {}: has {} target(s) a position, datum 0 has {}"
    other = [i for i, shape in enumerate(shapes) if shape != shapes[0]]
    if other:
        raise InvalidDatumsError([words.format(i, shapes[i] or "one", shapes[0] or "one") for i in other])


def _no_loss(data: Sequence[Any], logprobs: list[Tensor]) -> tuple[Tensor, Mapping[str, float]]:
    raise AssertionError("a call that only scores has no loss")
