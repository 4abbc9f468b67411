"""Which way a loss would go at a service, and what it would cost there; nothing is sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...datums.types import Datum
from ...errors import MixedDenominatorsError, UnsupportedError
from ...losses.base import Loss
from ..arguments import as_loss
from ..custom import custom_name
from ..protocol import CustomLoss
from ..types import Plan
from .accumulator import RemoteWindow

__all__ = ["plan_remote"]


def plan_remote(window: RemoteWindow, loss_fn: str | Loss | CustomLoss, data: Sequence[Datum]) -> Plan:
    """Plan ``forward_backward`` (or ``_custom``, for a function) as the next operation of a window.

    Args:
        window: what is open, and what the service can do.
        loss_fn: a registered loss or its name, or a function.
        data: datums; what they lack for this loss is refused in the plan.
    """
    tokens = sum(len(datum.model_input) for datum in data)
    cost: dict[str, Any] = {"tokens": tokens, "scored": tokens}
    loss = as_loss(loss_fn, None) if isinstance(loss_fn, (str, Loss)) else None
    if loss is not None:
        missing = [key for key in loss.required_inputs if any(key not in d.loss_fn_inputs for d in data)]
        if missing:
            return Plan("refuse", _missing_words(loss, missing))
    named = loss is not None and window.by_name(loss, None)
    try:
        if loss is not None and named:
            window.check_named(loss)
        else:
            window.check_here(
                loss_fn if loss is None else loss, custom_name(loss_fn) if loss is None else loss.name, None
            )
    except (UnsupportedError, MixedDenominatorsError) as error:
        return Plan("refuse", str(error))
    if loss is not None and named:
        return Plan("native", f"the service computes {loss.name} by name: one forward and one backward there", **cost)
    way = "forward there, the loss here, its cotangent back as the weights of a cross-entropy"
    if window.capabilities.keeps_graphs and not window.deferred:
        return Plan("single_pass", f"{way}; the service keeps the forward's graph for it", **cost)
    why = "held until optim_step" if window.deferred else "the service runs the forward twice"
    return Plan("two_passes", f"{way}; {why}", recomputed=tokens, **cost)


def _missing_words(loss: Loss, missing: Sequence[str]) -> str:
    words = f"missing required field {missing[0]!r}: {loss.name} needs {', '.join(missing)}"
    if "ref_logprobs" not in missing:
        return words
    return f"{words}; fill them in by with_reference(data, backend.reference())"
