"""A function of padded tensors, [B, T], whose arguments are matched by their names: one's own, verl's, TRL's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from ....errors import ConfigError
from ...cases import Case
from .base import LossUnderTest
from .names import FIELD_OF, KNOWN, role_of
from .registered import padded_column

__all__ = ["PaddedUnderTest", "roles_of"]

_PAIR_ROLES = ("chosen", "rejected", "ref_chosen", "ref_rejected")


@final
@dataclass(frozen=True)
class PaddedUnderTest(LossUnderTest):
    """A function of tensors.

    Attributes:
        function: what is called, with all arguments by name.
        roles: argument -> what it stands for.
        given: arguments with values of the caller's.
        optional: arguments that have a default of their own.
        bool_mask: whether masks are bool, rather than ones and zeros.
        style: ``padded``, ``verl`` or ``trl``.
        read: what it was seen to read of a dict of inputs.
    """

    function: Callable[..., Any] = None  # type: ignore[assignment]  # fields of the base have defaults
    roles: Mapping[str, str] = field(default_factory=dict)
    given: Mapping[str, Any] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()
    bool_mask: bool = True
    style: str = "padded"
    read: set[str] = field(default_factory=set, compare=False)

    @property
    def form(self) -> str:  # type: ignore[override]
        return self.style

    @property
    def layouts(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("right",) if self._pairwise else ("right", "left", "wide")

    @property
    def poisonable(self) -> bool:  # type: ignore[override]
        return not self._pairwise  # its sums over tokens are taken here

    @property
    def fields(self) -> tuple[str, ...]:
        found = (FIELD_OF[role] for role in (*self.roles.values(), *sorted(self.read)) if role in FIELD_OF)
        return tuple(dict.fromkeys(found))

    @property
    def required(self) -> tuple[str, ...]:
        roles = [role for name, role in self.roles.items() if name not in self.optional]
        needed = (FIELD_OF.get(role) for role in (*roles, *sorted(self.read)))
        return tuple(dict.fromkeys(name for name in needed if name is not None))

    @property
    def weighs(self) -> bool:
        return "weights" in {*self.roles.values(), *self.read} or self._pairwise

    @property
    def counts(self) -> tuple[str, ...]:
        return tuple(name for name, role in self.roles.items() if role == "count" and name not in self.given)

    @property
    def paired(self) -> bool:
        return self._pairwise or super().paired

    @property
    def relative(self) -> bool:
        return "rewards" in self.roles.values()

    @property
    def grouped(self) -> bool:
        return "groups" in {*self.roles.values(), *self.read}

    @property
    def against_reference(self) -> bool:
        return {"ref_chosen", "ref_rejected"} <= {*self.roles.values()}

    @property
    def _pairwise(self) -> bool:
        return "chosen" in self.roles.values()

    def arguments(self, case: Case, leaves: Sequence[Tensor], layout: str) -> Any:
        called = {
            name: self._value(role, case, leaves, layout) for name, role in self.roles.items() if role != "inputs"
        }
        inputs = [name for name, role in self.roles.items() if role == "inputs"]
        for name in inputs:
            called[name] = _Inputs(lambda role: self._value(role, case, leaves, layout), self.read)
        return {**called, **self.given}

    def call(self, arguments: Any) -> tuple[Tensor, Mapping[str, Any]]:
        return self.reduced(self.function(**arguments))

    def with_gradients(self, case: Case, leaves: Sequence[Tensor], layout: str, watched: dict[str, Tensor]) -> Any:
        called = self.arguments(case, leaves, layout)
        for name, role in self.roles.items():
            if FIELD_OF.get(role) in self.detached:
                watched[name] = called[name] = called[name].detach().requires_grad_()
        return called

    def _value(self, role: str, case: Case, leaves: Sequence[Tensor], layout: str) -> Any:
        dtype = leaves[0].dtype
        weights = [torch.tensor(list(s.weights), dtype=dtype) for s in case.sequences]
        if role in _PAIR_ROLES:
            return self._side(role, case, leaves, weights)
        match role:
            case "policy":
                return _pad(leaves, layout, case.padding)
            case "weights":
                return _pad(weights, layout, 0.0)
            case "mask" | "attention_mask":
                whole = role == "attention_mask" and len({"mask", "weights"} & set(self.roles.values())) > 0
                masks = [torch.ones_like(w) if whole else (w != 0).to(dtype) for w in weights]
                padded = _pad(masks, layout, 0.0)
                return padded.bool() if self.bool_mask else padded
            case "labels":
                masks = [torch.where(w != 0, 1, -100) for w in weights]
                return _pad([m.to(dtype) for m in masks], layout, -100.0).to(torch.int64)
            case "count":
                return sum(len(s.trained()) for s in case.sequences)
            case "groups":
                return torch.tensor([s.group for s in case.sequences])
        name = FIELD_OF[role]
        values = [torch.tensor(list(getattr(s, name)), dtype=dtype) for s in case.sequences]
        firsts = [(s.trained() or [0])[0] for s in case.sequences]
        return (
            torch.stack([v[k] for v, k in zip(values, firsts, strict=True)])
            if name in self.per_sequence
            else _pad(values, layout, case.padding)
        )

    def _side(self, role: str, case: Case, leaves: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        """Return the summed log-probs of one side of every pair, [P]."""
        rows = leaves
        if role.startswith("ref"):
            rows = [torch.tensor(list(s.ref_logprobs), dtype=leaves[0].dtype) for s in case.sequences]
        sums = [(torch.where(w != 0, row, 0.0) * w).sum() for row, w in zip(rows, weights, strict=True)]
        return torch.stack(sums[1 if "rejected" in role else 0 :: 2])


@final
class _Inputs(dict[str, Any]):
    """The ``inputs`` of a trainer's loss: what is asked for by a known name is there."""

    def __init__(self, value: Callable[[str], Any], read: set[str]) -> None:
        super().__init__()
        self._of, self._read = value, read

    def __missing__(self, name: str) -> Any:
        role = role_of(name)
        if role is None or role == "inputs":
            raise KeyError(name)
        self._read.add(role)
        self[name] = self._of(role)
        return self[name]

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (isinstance(name, str) and role_of(name) not in (None, "inputs"))

    def get(self, name: str, default: Any = None) -> Any:
        found = name in self  # by another name, too
        return self[name] if found else default


def roles_of(function: Callable[..., Any], given: Mapping[str, Any]) -> tuple[dict[str, str], frozenset[str]]:
    """Return what each argument of a function stands for, and which arguments have a default.

    Raises:
        ConfigError: an argument without a default has a name that stands for nothing.
    """
    roles, optional = {}, set()
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or name in given:
            continue
        role = role_of(name)
        if role is not None:
            roles[name] = role
        if parameter.default is not parameter.empty:
            optional.add(name)
        elif role is None:
            raise _unknown_argument(getattr(function, "__name__", str(function)), name)
    return roles, frozenset(optional)


def _unknown_argument(function: str, name: str) -> ConfigError:
    known = ", ".join(names[0] for names in KNOWN.values())
    sides = (
        "; the tokens of a pair are rows of one tensor, 2i the chosen answer and 2i + 1 the rejected one: check a function "
        "of (logprobs, ref_logprobs, mask) that slices them"
        if "chosen" in name or "rejected" in name
        else ""
    )
    return ConfigError(
        f"{function} takes {name!r}, which stands for nothing known ({known}); give it a default, "
        f"check_loss(..., arguments={{{name!r}: value}}), or --argument {name}=value on the command line{sides}"
    )


def _pad(rows: Sequence[Tensor], layout: str, fill: float) -> Tensor:
    return padded_column(rows, fill, left=layout == "left", spare=3 if layout == "wide" else 0)
