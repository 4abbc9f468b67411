"""The forms that a loss may have, and the one that a given loss has."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, TypeVar

import torch

from ....errors import ConfigError, suggestion
from ....losses.base import GradientKind, Loss
from ....losses.checks import choice
from ....losses.registry import get_loss
from ..invariance import INVARIANCES
from ..rerun import Rerun
from .base import Expected, LossUnderTest
from .datums import DatumsUnderTest
from .logits import LogitsUnderTest, takes_logits
from .measured import Measured, kind_case, leaves_of
from .names import FIELD_OF, role_of
from .padded import PaddedUnderTest, roles_of
from .registered import FIELDS, RegisteredUnderTest

Form = TypeVar("Form", bound=LossUnderTest)

__all__ = ["FORMS", "Expected", "LossUnderTest", "Measured", "loss_under_test"]

FORMS: Final = ("registered", "datums", "padded", "verl", "trl", "transformers")


def loss_under_test(
    loss: Any,
    form: str | None = None,
    *,
    kind: GradientKind | None = None,
    expected: Expected | None = None,
    detached: Sequence[str] = (),
    arguments: Mapping[str, Any] | None = None,
    per_sequence: Sequence[str] | None = None,
    invariant: Sequence[str] | None = None,
) -> LossUnderTest:
    """Return a loss in the one shape that the properties look at; arguments as of `check_loss`.

    Raises:
        ConfigError: the form is unknown or not that of the loss, or an argument's name stands for nothing.
        UnknownLossError: no loss is registered under that name.
    """
    if isinstance(loss, str):
        loss = get_loss(loss)
    if isinstance(loss, type) and issubclass(loss, Loss):
        loss = loss()
    if form is not None:
        choice("form", form, FORMS)
    for name in invariant or ():
        choice("invariant", name, INVARIANCES)
    _check_arguments(loss, arguments or {})
    options = {
        **{"form": form, "kind": kind, "expected": expected, "detached": tuple(detached) or None},
        **{"arguments": arguments or None, "per_sequence": per_sequence, "invariant": invariant},
    }
    common: dict[str, Any] = {"expected": expected, "rerun": Rerun.of(loss, options)}
    common["invariant"] = None if invariant is None else tuple(invariant)
    if isinstance(loss, Loss):
        return _registered(loss, kind, common)
    if not callable(loss) or isinstance(loss, type):
        what = f"the class {loss.__name__}: give an object of it" if isinstance(loss, type) else repr(loss)
        raise ConfigError(f"a loss is a Loss or a function, or the name of a registered loss, got {what}")
    common |= {"name": _name(loss), "declared": kind}
    loss = _called(loss)
    given, form = dict(arguments or {}), form or _form_of(loss)
    if form == "datums":
        return _of_datums(functools.partial(loss, **given) if given else loss, per_sequence, common)
    if form == "transformers":
        return LogitsUnderTest(function=functools.partial(loss, **given), **common)
    return _padded(loss, given, form, per_sequence, detached, common)


def _registered(loss: Loss, kind: GradientKind | None, common: Mapping[str, Any]) -> LossUnderTest:
    """Return a `Loss`, with one advantage a sequence where it asks for that."""
    declared = kind or loss.gradient_kind
    under_test = RegisteredUnderTest(name=loss.name, loss=loss, declared=declared, detached=("all",), **common)
    return _first_that_runs((under_test, replace(under_test, per_sequence=("advantages",))))


def _of_datums(function: Any, per_sequence: Sequence[str] | None, common: Mapping[str, Any]) -> LossUnderTest:
    """Return a function ``(data, logprobs_list) -> (loss, metrics)``, after one call, so that it is known what it reads."""
    under_test = DatumsUnderTest(function=function, per_sequence=tuple(per_sequence or ()), **common)
    _ = under_test.kind
    under_test.used.update(name for name in FIELDS if name not in under_test.read and _matters(under_test, name))
    return under_test


def _padded(
    function: Any,
    given: dict[str, Any],
    form: str,
    per_sequence: Sequence[str] | None,
    detached: Sequence[str],
    common: Mapping[str, Any],
) -> LossUnderTest:
    """Return a function of padded tensors, whose mask is bool or float."""
    roles, optional = roles_of(function, given)
    if not {"policy", "chosen", "inputs"} & {*roles.values()}:
        raise ConfigError(
            f"{common['name']}{inspect.signature(function)} takes no log-probs by a known name (logprobs, chosen_logps, "
            "inputs): what it is to be given cannot be told; form='datums' gives it (data, logprobs_list), and a decorator "
            "needs functools.wraps"
        )
    one_a_row = form == "trl" or "rewards" in roles.values()
    rows = per_sequence if per_sequence is not None else (("advantages",) if one_a_row else ())
    under_test = PaddedUnderTest(
        function=function,
        roles=roles,
        given=given,
        optional=optional,
        per_sequence=tuple(rows),
        style=form,
        detached=tuple(FIELD_OF.get(role_of(name) or "", name) for name in detached),
        **common,
    )
    return _first_that_runs((under_test, replace(under_test, bool_mask=False)))


def _called(loss: Callable[..., Any]) -> Callable[..., Any]:
    """Return what is called; of a module, with the arguments of its forward."""
    if not isinstance(loss, torch.nn.Module):
        return loss
    return functools.wraps(loss.forward)(lambda *args, **named: loss(*args, **named))


def _check_arguments(loss: Any, arguments: Mapping[str, Any]) -> None:
    """Check that a loss takes the arguments that it is to be given.

    Raises:
        ConfigError: it takes none of such a name, or is no function.
    """
    if not arguments or not callable(loss):
        return
    if isinstance(loss, Loss):
        raise ConfigError(
            f"arguments is for functions, got {', '.join(arguments)}; a Loss is given its hyperparameters when it is made"
        )
    parameters = inspect.signature(_called(loss)).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for name in arguments:
        if name not in parameters:
            raise ConfigError(
                f"arguments has {name!r}, which {_name(loss)} does not take{suggestion(name, parameters)}; it takes "
                f"{', '.join(parameters) or 'nothing'}"
            )


def _first_that_runs(candidates: tuple[Form, ...]) -> Form:
    """Return the first form that a loss does not refuse; if it refuses all, the first."""
    case = kind_case(False)
    for each in candidates:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # whether it runs is all that is asked
                each.run(case, leaves_of(case))
        except Exception:
            continue
        return each
    return candidates[0]


def _matters(under_test: LossUnderTest, field: str) -> bool:
    try:
        return under_test.matters(kind_case(False), field)
    except Exception:
        return False


def _form_of(function: Callable[..., Any]) -> str:
    if takes_logits(function):
        return "transformers"
    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
    roles = {role_of(p.name) for p in parameters}
    needed = [p for p in parameters if p.default is p.empty]
    if {"policy", "chosen"} & roles and len(needed) != 2:
        return "padded"
    if needed and role_of(needed[0].name) in ("policy", "chosen"):
        return "padded"
    if len(needed) == 2:
        return "datums"
    return "padded"


def _name(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)
