"""What a backend would do with a call, and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...datums.types import Datum
from ...errors import MissingReferenceError
from ...losses.base import Loss
from ..protocol import CustomLoss
from ..types import Plan
from .batching import loss_units
from .engine import Engine, as_loss
from .planning import make_plan

__all__ = ["plan_call"]


def plan_call(
    engine: Engine, loss_fn: str | Loss | CustomLoss, data: Sequence[Datum], reference: Callable[[], object]
) -> Plan:
    """Plan ``forward_backward`` (or ``_custom``, for a function); nothing runs.

    Args:
        engine: model, layouts and sizes.
        loss_fn: a registered loss or its name, or a function.
        data: datums; what they lack for this loss is refused in the plan.
        reference: returns the reference model or raises `MissingReferenceError`.
    """
    if not isinstance(loss_fn, (str, Loss)):
        requests = engine.check(data)
        layout, batches = engine.split(requests, [[i] for i in range(len(data))])
        reason = f"a function of all log-probs: one forward, its graphs kept; {_layout_words(engine)}"
        return make_plan(engine.sizes, "single_pass", reason, layout, requests, batches)
    loss = as_loss(loss_fn, None)
    missing = [key for key in loss.required_inputs if any(key not in d.loss_fn_inputs for d in data)]
    if missing:
        return make_plan(engine.sizes, "refuse", _missing_words(loss, missing, reference), "single", [], [])
    requests = engine.check(data, loss, "trained")
    layout, batches = engine.split(requests, loss_units(loss, data))
    reason = f"{loss.name} is registered ({loss.gradient_kind} kind): streamed by micro-batch; {_layout_words(engine)}"
    return make_plan(engine.sizes, "native", reason, layout, requests, batches)


def _layout_words(engine: Engine) -> str:
    if "packed" in engine.layouts:
        return "sequences may be packed"
    return "packing is off (not allowed, or the model lets packed sequences see each other)"


def _missing_words(loss: Loss, missing: Sequence[str], reference: Callable[[], object]) -> str:
    words = f"missing required field {missing[0]!r}: {loss.name} needs {', '.join(missing)}"
    if "ref_logprobs" not in missing:
        return words
    try:
        reference()
    except MissingReferenceError as error:
        return f"{words}; {error}"
    return f"{words}; fill them in by with_reference(data, backend.reference())"
