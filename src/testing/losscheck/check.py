"""`check_loss`: all properties of a loss, of anybody's, in any form."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ...errors import PullbackError
from ...losses.base import GradientKind
from ...losses.checks import choice
from ..cases import Case
from .failures import NotApplicable
from .forms import Expected, LossUnderTest, loss_under_test
from .properties import LOSS_PROPERTIES
from .results import LossCheckError, LossReport, Property, Result
from .running import crash
from .search import Counterexample, outcome, search

__all__ = ["check_loss", "check_property", "loss_report"]

_ON_A_CASE: Final = ("differences", "untrained", "permutation", "layouts", "metrics", "kind")
_EXAMPLES: Final = 20


def check_loss(
    loss: Any,
    case: Case | None = None,
    *,
    form: str | None = None,
    kind: GradientKind | None = None,
    expected: Expected | None = None,
    detached: Sequence[str] = (),
    arguments: Mapping[str, Any] | None = None,
    per_sequence: Sequence[str] | None = None,
    invariant: Sequence[str] | None = None,
    only: str | Sequence[str] | None = None,
    examples: int = _EXAMPLES,
    shrink: bool = True,
    differences: bool = True,
) -> LossReport:
    """Check the properties that every sound loss has.

    Args:
        loss: a `Loss`, or the name of a registered one; or a function: Tinker's ``(data, logprobs_list) -> (loss, metrics)``;
            one of padded tensors, whose arguments are known by their names (log-probs, mask or weights, advantages, old, ref,
            rollout log-probs, ...), as verl's and TRL's are; or transformers' ``(outputs, labels, num_items_in_batch)``.
        case: check on this batch alone, instead of on random ones.
        form: ``datums``, ``padded``, ``verl``, ``trl`` or ``transformers``, where it cannot be told by the signature.
        kind: the gradient kind that a function claims to have; see `pullback.losses`.
        expected: from a `Case` to the gradient in closed form, one list per sequence.
        detached: arguments that no gradient may flow into, e.g. ``("advantages",)``.
        arguments: values for arguments of a function that are its own, e.g. ``{"config": ...}``.
        per_sequence: inputs of which there is one number per sequence, [B]; by default the advantages, of the form ``trl``.
        invariant: what a shift may not change: ``anchors`` (log-probs count by their distances to old, sampler and reference),
            ``pair`` (the two sides of a pair by their difference), ``group`` (rewards by their differences within a group).
            Absent: what is recognised.
        only: names of properties; absent: all.
        examples: random batches per property.
        shrink: look for the smallest batch on which a property fails; else the first one is reported.
        differences: compare the gradient with differences of the value (with a case only).

    Returns:
        The report; print it for a table.

    Raises:
        LossCheckError: some property fails; says which, the likely cause, and the smallest batch that shows it.
        ConfigError: the loss cannot be called in that form, takes no argument of a name in ``arguments``, or a property's
            name is unknown.
        UnknownLossError: no loss is registered under that name.
    """
    under_test = loss_under_test(
        loss,
        form,
        kind=kind,
        expected=expected,
        detached=detached,
        arguments=arguments,
        per_sequence=per_sequence,
        invariant=invariant,
    )
    names = [only] if isinstance(only, str) else list(only or (_ON_A_CASE if case is not None else LOSS_PROPERTIES))
    names = [name for name in names if differences or name != "differences"]
    for name in names:
        choice("property", name, LOSS_PROPERTIES)
    crashed = crash(under_test, examples) if case is None else None
    checked = (check_property(under_test, name, examples, case, shrink=shrink) for name in names)
    report = LossReport.of(under_test, checked if crashed is None else [crashed])
    if report.failed:
        raise LossCheckError(report)
    return report


def loss_report(loss: Any, **options: Any) -> LossReport:
    """Return what `check_loss` finds, without raising where a property fails; options as of `check_loss`."""
    try:
        return check_loss(loss, **options)
    except LossCheckError as error:
        return error.report


def check_property(
    under_test: LossUnderTest, name: str, examples: int = _EXAMPLES, case: Case | None = None, *, shrink: bool = True
) -> Result:
    """Return the result of one property; arguments as of `check_loss`.

    Raises:
        ConfigError: no property has that name.
    """
    choice("property", name, LOSS_PROPERTIES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a loss may warn; what it computes is looked at
        return _result(under_test, LOSS_PROPERTIES[name], examples, case, shrink)


def _result(under_test: LossUnderTest, checked: Property, examples: int, case: Case | None, shrink: bool) -> Result:
    try:
        note = search(under_test, checked, examples, shrink) if case is None else outcome(under_test, checked, case)
    except NotApplicable as reason:
        return Result(checked.name, "not applicable", str(reason))
    except Counterexample as found:
        if case is not None and isinstance(found.failure.__cause__, PullbackError):
            return Result(checked.name, "not applicable", f"the loss refuses this batch: {found.failure.__cause__}")
        return _failure(under_test, checked, found)
    return Result(checked.name, "passed", note or "")


def _failure(under_test: LossUnderTest, checked: Property, found: Counterexample) -> Result:
    causes = found.failure.cause or ", or ".join(checked.causes)
    sentence = f"{str(found.failure).rstrip('.')}. Likely cause: {causes}."
    case = found.case or found.failure.case
    example = "" if case is None else _example(under_test, case)
    again = under_test.rerun.line(checked.name, found.case)  # a property with numbers of its own has them again
    return Result(checked.name, "failed", sentence, case, example, again, under_test.rerun.setup)


def _example(under_test: LossUnderTest, case: Case) -> str:
    """Return a case in tokens and numbers, with what the loss makes of it."""
    columns = {
        "weight": "weights",
        "logprob": "logprobs",
        **{f.removesuffix("_logprobs").removesuffix("s"): f for f in under_test.fields},
    }
    try:
        rows = [row.tolist() for row in under_test.measure(case).rows]
    except Exception:
        rows = []
    lines = []
    for i, s in enumerate(case.sequences):
        for j in range(len(s.logprobs)):
            numbers = "  ".join(f"{title} {getattr(s, field)[j]:g}" for title, field in columns.items())
            slope = f"  gradient {rows[i][j] + 0.0:.5g}" if rows else ""  # + 0.0: no minus before 0
            lines.append(f"sequence {i} token {j}:  {numbers}{slope}")
    return "\n".join(lines)
