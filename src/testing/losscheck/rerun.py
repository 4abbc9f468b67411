"""The line of Python that shows a failure again, and what has to be imported for it."""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, cast, final

from ...losses.base import Loss
from ..cases import COLUMNS, Case

__all__ = ["Rerun", "case_code"]

_TESTING: Final = "from pullback.testing import Case, CaseSequence, check_loss"


@final
@dataclass(frozen=True)
class Rerun:
    """How a loss was asked for.

    Attributes:
        loss: an expression for it; ``loss`` where it has no name of its own.
        options: keyword arguments of `check_loss`, as code.
        setup: the imports.
    """

    loss: str = "loss"
    options: tuple[str, ...] = ()
    setup: str = _TESTING

    @classmethod
    def of(cls, loss: Any, options: Mapping[str, Any]) -> Rerun:
        """Return it for a loss and the options that were given.

        Args:
            loss: a `Loss` or a function.
            options: of `check_loss`; None was not given.
        """
        given = tuple(f"{name}={_value(name, value)}" for name, value in options.items() if value is not None)
        if isinstance(loss, Loss):
            return cls(_constructor(loss), given, f"{_TESTING}; from pullback.losses import *{_of_others(type(loss))}")
        name = getattr(loss, "__name__", "")
        if not name.isidentifier():
            return cls(options=given)
        return cls(name, given, _TESTING + _of_others(loss))

    def line(self, name: str, case: Case | None) -> str:
        """Return the call that checks one property again, on a case where there is one."""
        shown = () if case is None else (case_code(case),)
        return f"check_loss({', '.join((self.loss, *shown, *self.options, f'only={name!r}'))})"


def case_code(case: Case) -> str:
    """Return a case as Python."""
    rows = []
    for s in case.sequences:
        columns = [f"[{', '.join(_number(x) for x in getattr(s, name))}]" for name in COLUMNS]
        rows.append(f"CaseSequence({', '.join(columns)}{f', group={s.group}' if s.group else ''})")
    return f"Case(({', '.join(rows)},){', with_old=True' if case.with_old else ''})"


def _number(x: float) -> str:
    return repr(float(x)) if math.isfinite(x) else f"float('{float(x)}')"


def _constructor(loss: Loss) -> str:
    """Return the call that makes a loss, with the fields that are not their defaults."""
    try:
        plain: Any = type(loss)()
    except TypeError:  # a field has no default
        plain = object()
    names = [field.name for field in fields(cast(Any, loss)) if field.init]
    given = {name: getattr(loss, name) for name in names}
    changed = [f"{name}={x!r}" for name, x in given.items() if x != getattr(plain, name, object())]
    return f"{type(loss).__name__}({', '.join(changed)})"


def _value(name: str, value: Any) -> str:
    """Return a literal, or else the name under which the caller has the value."""
    value = dict(value) if isinstance(value, Mapping) else value
    try:
        ast.literal_eval(repr(value))
    except (ValueError, SyntaxError):
        own = getattr(value, "__name__", "")
        return own if own.isidentifier() else name
    return repr(value)


def _of_others(thing: Any) -> str:
    """Return the import of what stands in a module of the caller's."""
    module, name = getattr(thing, "__module__", ""), getattr(thing, "__qualname__", "")
    if module in ("", "__main__", None) or "." in name or module.startswith("pullback.losses"):
        return ""
    return f"; from {module} import {name}"
