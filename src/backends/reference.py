"""The frozen reference: forward only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

from ..datums.types import Datum
from ..errors import MissingReferenceError
from ..losses.base import Loss
from .futures import Future
from .protocol import ReferenceModel
from .types import ForwardBackwardOutput

__all__ = ["ReferenceView", "refusal", "with_reference"]

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


def refusal(loss: Loss, missing: Sequence[str], reference: Callable[[], object]) -> str:
    """Say what data lacks for a loss, and where reference log-probs would come from.

    Args:
        loss: the loss.
        missing: keys that some datum lacks.
        reference: returns the reference model, or raises `MissingReferenceError`.
    """
    reason = f"missing required field {missing[0]!r}: {loss.name} needs {', '.join(missing)}"
    if "ref_logprobs" not in missing:
        return reason
    try:
        reference()
    except MissingReferenceError as error:
        return f"{reason}; {error}"
    return f"{reason}; fill them in by with_reference(data, backend.reference())"
