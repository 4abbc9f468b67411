"""What a backend would do with a call, and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...datums.types import Datum
from ...errors import MissingReferenceError
from ...losses.base import Loss
from ..arguments import as_loss
from ..protocol import CustomLoss
from ..types import Plan
from .engine import Engine
from .execution.batching import Layout, loss_units
from .execution.cost_model import Route, make_plan
from .execution.gradient import streams_known

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
        words = f"a function of all log-probs: one forward, its graphs kept; {_layout_words(engine)}"
        return make_plan(engine.sizes, _route(engine, "single_pass", words, layout, True), layout, requests, batches)
    loss = as_loss(loss_fn, None)
    missing = [key for key in loss.required_inputs if any(key not in d.loss_fn_inputs for d in data)]
    if missing:
        return Plan("refuse", _missing_words(loss, missing, reference))
    requests = engine.check(data, loss, "trained")
    layout, units = engine.split(requests, loss_units(loss, data))
    batches = [forward for batch in units for forward in engine.forwards(requests, batch, layout)]
    words = f"{loss.name} is registered ({loss.gradient_kind} kind): streamed by micro-batch; {_layout_words(engine)}"
    known = streams_known(engine.model, loss, requests)
    route = _route(engine, "native", words, layout, loss.gradient_kind == "batch", known)
    return make_plan(engine.sizes, route, layout, requests, batches)


def _route(engine: Engine, name: str, reason: str, layout: Layout, keeps: bool, known: bool = False) -> Route:
    settings = engine.room.settings(layout)
    recomputes = settings.overflow == "recompute"
    budget = settings.budget if recomputes else float("inf")
    return Route(name, reason, keeps, known, budget, settings.meter.predict(1))


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
