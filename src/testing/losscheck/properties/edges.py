"""The edges: extreme numbers, low precision, few sequences, nothing trained."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Final

import torch

from ....errors import PullbackError
from ...cases import COLUMNS, Case, CaseSequence
from ..failures import Failed, NotApplicable
from ..forms import LossUnderTest, Measured
from ..forms.measured import kind_case
from ..results import Property

__all__ = ["EDGES", "first_token"]

_EXTREME: Final = (0.0, -1e-6, -1.0, -1e4)
_DTYPES: Final = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.1}
_FAR: Final = (-6.0, 6.0)


def _row(at: float, other: float, advantage: float) -> CaseSequence:
    two = [at, -1.0]
    anchor = [other, -1.0]
    return CaseSequence(two, [1.0, 1.0], [advantage, 0.5], anchor, anchor, anchor)  # whose sum is not 0


def _extremes(under_test: LossUnderTest, case: Case) -> None:
    for dtype in _DTYPES:
        for at in _EXTREME:
            for other in _EXTREME:
                rows = tuple(_row(x, y, a) for x, y, a in ((at, other, 1.0), (other, at, -1.0)))
                extreme = Case(rows, with_old=True)
                measured = under_test.measure(extreme, dtype=dtype)
                if not _finite(measured):
                    name = str(dtype).removeprefix("torch.")
                    raise Failed(
                        f"in {name} a log-prob of {at:g} (anchor and reference {other:g}) gives a loss of {measured.value:g}, "
                        f"and gradients of {float(measured.rows[0][0]):g} and {float(measured.rows[1][0]):g}",
                        "an exp overflows, or the log of 0: bound the log-ratio before exp, and use log1p, expm1, logsigmoid",
                        extreme,
                    )


def _finite(measured: Measured) -> bool:
    return math.isfinite(measured.value) and bool(measured.flat.isfinite().all())


def _alive(under_test: LossUnderTest, case: Case) -> None:
    """Near certain and near impossible tokens, and those far from the reference, still have a gradient."""
    levels = [(at, _on_policy(under_test, at)) for at in (-1e-3, -0.05, -1.0, -12.0)]
    dead = [(at, case) for at, case in levels if any(float(row[0]) == 0.0 for row in under_test.measure(case).rows)]
    if dead:
        at, likely = dead[0]
        raise Failed(
            f"a trained token of log-prob {at:g} has no gradient, on policy",
            _why_dead([each in dead for each in levels]),
            likely,
        )
    if "ref_logprobs" not in under_test.fields:
        return
    near = max(_pull(under_test, d) for d in (-1.0, 1.0))
    for d in _FAR:
        if near > 0.0 and _pull(under_test, d) == 0.0:
            raise Failed(
                f"where the policy is {abs(d):g} nats {'below' if d < 0 else 'above'} the reference, the reference has no "
                "influence on the gradient any more; at 1 nat it has",
                "a clamp on the KL or its log-ratio: the penalty is switched off where it is needed most; use a tangent there",
                _far_from_reference(d),
            )


def _why_dead(dead: list[bool]) -> str:
    """Return why some of several levels, from likely to unlikely, have no gradient."""
    if all(dead):
        return "it has none at any log-prob, so this is no clamp of log-probs; `influence` says more"
    if dead[0] or dead[-1]:
        return "a clamp: beyond its bound nothing is learnt any more; use a tangent there"
    return "on both sides it has one, so its sign changes there: a weight that should be detached is not"


def _on_policy(under_test: LossUnderTest, at: float) -> Case:
    """Return two sequences of the policy's own; the reference is elsewhere where nothing else is there to learn from."""
    rows: tuple[CaseSequence, ...] = (_row(at, at, 1.0), _row(at, at, -1.0))
    if not under_test.paired and "ref_logprobs" in under_test.fields and "advantages" not in under_test.fields:
        rows = tuple(replace(s, ref_logprobs=[x - 1.0 for x in s.logprobs]) for s in rows)
    return Case(rows, with_old=True)


def _pull(under_test: LossUnderTest, distance: float) -> float:
    """Return how much the gradient changes where the reference, ``distance`` nats away, is moved a little."""

    near, far = (under_test.measure(_far_from_reference(d)).flat for d in (distance, distance * 1.01))
    return float((near - far).abs().max())


def _far_from_reference(distance: float) -> Case:
    first, second = _row(-8.0, -8.0, 1.0), _row(-8.0, -8.0, -1.0)
    return Case((replace(first, ref_logprobs=[-8.0 - distance, -1.0]), second), with_old=True)


def _precision(under_test: LossUnderTest, case: Case) -> None:
    exact = under_test.measure(case)
    for dtype, tolerance in _DTYPES.items():
        rounded = under_test.measure(case, dtype=dtype)
        name = str(dtype).removeprefix("torch.")
        error = float((rounded.flat - exact.flat).norm())
        if not error <= tolerance * max(float(exact.flat.norm()), 1e-3):
            raise Failed(
                f"in {name} the gradient differs by {error:.3g}, of {float(exact.flat.norm()):.3g}",
                "log-ratios and sums in half precision, or a cancellation: compute in fp32 or better",
            )


def _resolution(under_test: LossUnderTest, case: Case) -> None:
    """Move one log-prob by 1 nat and by a few thousandths: half precision has steps of 0.03 nats there."""
    at = -7.3
    rows = [under_test.measure(_moved(at, by)) for by in (0.0, 0.002, 1.0)]
    still, small, large = ((measured.value, measured.flat.tolist()) for measured in rows)
    if still == large:
        raise NotApplicable("neither its value nor its gradient depends on how likely a token is")
    if still == small:
        raise Failed(
            f"a log-prob of {at:g} that moves by 0.002 nats changes neither the loss nor its gradient; by 1 nat it does",
            "half precision inside: bf16 has steps of 0.03 nats there, so that log-ratios are noise; compute in fp32",
            _moved(at, 0.002),
        )


def _moved(at: float, by: float) -> Case:
    rows = tuple(replace(_row(at, at, a), logprobs=[at + by, -1.0]) for a in (1.0, -1.0))
    return Case((rows[0], replace(rows[1], logprobs=[at, -1.0])), with_old=True)


def _few(under_test: LossUnderTest, case: Case) -> None:
    per = under_test.unit()
    one = tuple(_row(-1.25, -1.0, a) for a in (1.0, -1.0))[:per]
    short = tuple(first_token(s) for s in one)
    groups = [("one unit", one), ("one unit of single tokens", short)]
    if per == 1:
        groups.append(
            ("three sequences", tuple(_row(x, -1.0, a) for x, a in ((-1.25, 1.0), (-0.75, -1.0), (-0.5, 0.5))))
        )
    for words, rows in groups:
        case = Case(rows, with_old=True)
        try:
            measured, _ = under_test.measure(case), under_test.metrics(case)
        except Failed:
            raise
        except Exception as error:
            raise Failed(
                f"{words}: {type(error).__name__}: {error}",
                "a squeeze(), or a batch of more is taken for granted",
                case,
            ) from error
        if not _finite(measured):
            raise Failed(
                f"{words}: the loss is {measured.value:g}",
                "the standard deviation of one number is NaN: it is 0/0",
                case,
            )


def first_token(s: CaseSequence) -> CaseSequence:
    """Return a sequence of no more than its first token."""
    columns: dict[str, Any] = {name: getattr(s, name)[:1] for name in COLUMNS}
    return replace(s, **columns)


def _nothing_trained(under_test: LossUnderTest, case: Case) -> str | None:
    case = kind_case(False).edited("weights", lambda i, j, w: 0.0)
    try:
        measured, _ = under_test.measure(case), under_test.metrics(case)
    except Failed as failure:
        if "not connected" in str(failure):
            raise Failed(
                "with nothing trained the loss is not connected to the log-probs",
                "backward() raises: return a sum over nothing, not a constant",
                case,
            ) from failure
        raise
    except (PullbackError, ValueError) as error:
        return f"refused by {type(error).__name__}"
    except Exception as error:
        raise Failed(
            f"with nothing trained: {type(error).__name__}: {error}",
            "a maximum or mean of nothing; a metric must not raise",
            case,
        ) from error
    if not _finite(measured):
        raise Failed(
            f"with nothing trained the loss is {measured.value:g}", "0/0: clamp the count that is divided by to 1", case
        )
    if bool((measured.flat != 0).any()):
        raise Failed("with nothing trained there is a gradient", "a term without a mask", case)
    return None


def _connected(under_test: LossUnderTest, case: Case) -> None:
    if under_test.form != "datums":
        raise NotApplicable("only lists of datums have one leaf per sequence")
    case = replace(
        case, sequences=(*case.sequences, *kind_case(False).edited("weights", lambda i, j, w: 0.0).sequences[:2])
    )
    loose = under_test.measure(case).loose
    if loose:
        raise Failed(
            f"the loss is not connected to the log-probs of sequence {loose[0]}, of which nothing is trained",
            "a sequence is skipped: Tinker's client raises 'No gradient computed for logprob tensor'; add a masked sum",
        )


EDGES = (
    Property(
        "extremes",
        "Log-probs from 0 to -1e4, and ratios that overflow, give finite numbers in fp64, fp32 and bf16.",
        ("an exp overflows",),
        _extremes,
        "none",
    ),
    Property(
        "alive",
        "No clamp switches the gradient off: not near certainty, and not far from the reference.",
        ("a clamp",),
        _alive,
        "none",
    ),
    Property("precision", "fp32 and bf16 agree with fp64.", ("sums in half precision",), _precision, "on_policy"),
    Property(
        "resolution",
        "A difference of two thousandths of a nat is seen.",
        ("half precision inside",),
        _resolution,
        "none",
    ),
    Property("few", "One unit, one token and three sequences do.", ("a squeeze()",), _few, "none"),
    Property(
        "nothing_trained",
        "With nothing trained the loss is finite and its gradient 0, or it is refused.",
        ("0/0",),
        _nothing_trained,
        "none",
    ),
    Property("connected", "The loss is connected to every log-prob.", ("a sequence is skipped",), _connected),
)
