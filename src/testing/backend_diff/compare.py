"""diff: two backends, one loss, the same data, stage by stage as far as the first divergence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Final

from ...backends.calls.losses import as_loss, loss_name
from ...backends.protocol import CustomLoss, TrainerBackend
from ...backends.types import AdamParams
from ...datums.types import Datum
from ...errors import DatumError, UnsupportedError
from ...losses.base import Loss
from .results import BackendDiff
from .sides import Side, dtype_of
from .stages import Comparison
from .tolerances import Tolerance, least_precise, tolerance_of

__all__ = ["diff"]

_PARAMS: Final = AdamParams(learning_rate=1e-3, eps=1e-6)


def diff(
    backend_a: TrainerBackend,
    backend_b: TrainerBackend,
    loss: str | Loss | CustomLoss,
    data: Sequence[Datum],
    *,
    loss_fn_config: Mapping[str, Any] | None = None,
    names: tuple[str, str] = ("a", "b"),
    dtypes: tuple[str | None, str | None] = (None, None),
    tolerance: Tolerance | None = None,
    params: AdamParams = _PARAMS,
    tokenizer: Any = None,
    allow_step: bool = False,
) -> BackendDiff:
    """Compare two backends that should be the same; say where they diverge first, and what it may come from.

    Stages: log-probs; the value of the loss; the cotangent dL/dlogprob; the gradient, by parameter where both can be read, else
    as the change of log-probs by a step along it; the change by an optimizer step. Each is compared only where those before it
    agree. Both backends are left as they were (weights, optimizer, accumulated gradients). Where that is impossible, as at
    most services, only what leaves no trace is compared.

    Args:
        backend_a, backend_b: with the same weights, as one believes.
        loss: a registered name, a loss, or a function ``(data, logprobs_list) -> (loss, metrics)``.
        data: datums; whole units of the loss.
        loss_fn_config: hyperparameters, with a name only.
        names: of the two, for the report.
        dtypes: of the weights; None: as the backend shows, float32 where it does not.
        tolerance: default: that of the less precise dtype, see `TOLERANCES`.
        params: of the optimizer step.
        tokenizer: has ``decode``; shows tokens as text.
        allow_step: a backend whose state cannot be kept may be stepped. The result says what was left.

    Raises:
        DatumError: there are no datums, or they are wrong.
        LossError: there is no such loss.
        UnsupportedError: one of the backends refuses this loss and data.
        BackendError: an operation failed, or a backend that cannot be preserved has accumulated gradients.
    """
    if not data:
        raise DatumError("diff needs at least one datum")
    own = as_loss(loss, loss_fn_config) if isinstance(loss, (str, Loss)) else loss
    backends = (backend_a, backend_b)
    found = tuple(given or dtype_of(backend) for given, backend in zip(dtypes, backends, strict=True))
    limits = tolerance or tolerance_of(*found)
    sides = [Side(n, x, data, loss, loss_fn_config, allow_step) for n, x in zip(names, backends, strict=True)]
    run = Comparison(sides[0], sides[1], data, limits, params, tokenizer)
    with ExitStack() as stack:
        for side in sides:
            side.enter(stack)
            _require_planned(side, own)
        run.start()
        if run.open:
            run.finish()
    return BackendDiff(
        a=names[0],
        b=names[1],
        loss=loss_name(loss),
        dtypes=(found[0], found[1]),
        datums=len(data),
        tokens=sum(len(x) for x in run.before.a),
        stages=tuple(run.stages),
        tokens_differing=run.tokens_differing,
        token_diffs=run.tokens,
        layers=run.layers,
        cause=run.cause,
        left="; ".join(f"{side.name}: {side.left}" for side in sides if side.left),
        tolerance_of="" if tolerance else least_precise(*found),
    )


def _require_planned(side: Side, loss: Loss | CustomLoss) -> None:
    plan = side.backend.plan(loss, side.data)
    if plan.route == "refuse":
        raise UnsupportedError(f"{side.name} refuses {loss_name(loss)} on this data: {plan.reason}")
