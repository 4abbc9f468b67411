"""The frozen reference: forward only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

from ..datums.types import Datum
from .futures import Future
from .protocol import ReferenceModel
from .types import ForwardBackwardOutput

__all__ = ["ReferenceView", "with_reference"]

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
