"""The frozen reference: forward only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from ..datums.mismatched import mismatched
from ..datums.types import Datum, TensorData
from ..errors import MissingReferenceError
from ..losses.base import Loss
from ..losses.functional.preference import reference_point
from .operations.futures import Future
from .protocol import ReferenceModel, TrainerBackend
from .types import ForwardBackwardOutput

__all__ = ["ReferenceView", "refusal", "with_reference", "with_reference_point"]

Forward = Callable[[Sequence[Datum], str, Mapping[str, Any] | None], Future[ForwardBackwardOutput]]


@final
class ReferenceView:
    """Scores with the reference weights and has no verb that could train them."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward

    def forward(
        self, data: Sequence[Datum], loss_fn: str = "cross_entropy", loss_fn_config: Mapping[str, Any] | None = None
    ) -> Future[ForwardBackwardOutput]:
        """Score all target tokens; no gradient."""
        return self._forward(data, loss_fn, loss_fn_config)


def with_reference(data: Sequence[Datum], reference: ReferenceModel) -> list[Datum]:
    """Return the datums with ``ref_logprobs`` filled in by one forward of the reference."""
    scored = reference.forward(data).result()
    return [
        datum.with_inputs(ref_logprobs=output["logprobs"])
        for datum, output in zip(data, scored.loss_fn_outputs, strict=True)
    ]


def with_reference_point(
    data: Sequence[Datum],
    policy: ReferenceModel | TrainerBackend,
    reference: ReferenceModel,
    max_length: int | None = None,
) -> list[Datum]:
    """Return the datums with KTO's ``reference_point``: the KL of policy and reference, measured on `mismatched` answers.

    It changes with every step, and costs one forward of each model. Of a step that is cut into calls give all datums at
    once, and of data parallel ranks those of all.

    Args:
        data: at least two datums; those of one step.
        policy: the backend that is trained.
        reference: e.g. ``policy.reference()``.
        max_length: of a prompt with the answer to another, tokens; see `mismatched`.
    """
    others = with_reference(mismatched(data, max_length), reference)
    scored = policy.forward(others).result()
    sums = [_log_ratio(datum, output["logprobs"]) for datum, output in zip(others, scored.loss_fn_outputs, strict=True)]
    point = float(reference_point(torch.stack(sums)))
    return [datum.with_inputs(reference_point=[point]) for datum in data]


def _log_ratio(datum: Datum, logprobs: TensorData) -> Tensor:
    weights, reference = (datum.loss_fn_inputs[name].to_torch().double() for name in ("weights", "ref_logprobs"))
    return torch.where(weights != 0, weights * (logprobs.to_torch().double() - reference), 0.0).sum()


def refusal(loss: Loss, missing: Sequence[str], reference: Callable[[], object]) -> str:
    """Say what data lacks for a loss, and where reference log-probs would come from.

    Args:
        loss: the loss.
        missing: keys that some datum lacks.
        reference: returns the reference model, or raises `MissingReferenceError`.
    """
    reason = f"missing required field {missing[0]!r}: {loss.name} needs {', '.join(missing)}"
    if "reference_point" in missing and "ref_logprobs" not in missing:
        return f"{reason}; fill it in by with_reference_point(data, backend, backend.reference())"
    if "ref_logprobs" not in missing:
        return reason
    try:
        reference()
    except MissingReferenceError as error:
        return f"{reason}; {error}"
    return f"{reason}; fill them in by with_reference(data, backend.reference())"
