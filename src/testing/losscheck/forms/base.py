"""LossUnderTest: what the properties ask of a loss, whatever its form."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Final, final

import torch
from torch import Tensor

from ....losses.base import GradientKind
from ....losses.kind import dependence
from ...cases import Case
from ..invariance import invariances_of
from ..rerun import Rerun
from .measured import Measured, kind_case, leaves_of, require_connected
from .returned import loss_and_metrics

__all__ = ["ANCHORS", "Expected", "LossUnderTest"]

ANCHORS: Final = ("rollout_logprobs", "old_logprobs")
_APART: Final = 300.0  # nats, between the two sides of a pair
Expected = Callable[[Case], Sequence[Sequence[float]]]


@dataclass(frozen=True)
class LossUnderTest(abc.ABC):
    """A loss in some form, as numbers in and numbers out.

    Attributes:
        name: of the loss.
        declared: the gradient kind that it declares, if it does.
        expected: its gradient in closed form, if that is known.
        detached: inputs that no gradient may flow into.
        per_sequence: inputs of which it takes one number per sequence: that of the first trained token.
        rerun: how it was asked for.
        invariant: what a shift may not change, of `INVARIANCES`; None: what is recognised.
        averaged: how many numbers it returned, wherever it did not return one: their mean is checked.
    """

    name: str
    declared: GradientKind | None = None
    expected: Expected | None = None
    detached: tuple[str, ...] = ()
    per_sequence: tuple[str, ...] = ()
    invariant: tuple[str, ...] | None = None
    rerun: Rerun = field(default_factory=Rerun)
    averaged: set[int] = field(default_factory=set, compare=False)

    form: ClassVar[str] = "function"
    layouts: ClassVar[tuple[str, ...]] = ("plain",)
    poisonable: ClassVar[bool] = True

    @property
    @abc.abstractmethod
    def fields(self) -> tuple[str, ...]:
        """What it reads beside the log-probs, as fields of a `CaseSequence`."""

    @property
    def required(self) -> tuple[str, ...]:
        """Those of the fields that it cannot do without."""
        return self.fields

    @property
    def weighs(self) -> bool:
        """Whether it takes weights, rather than a mask."""
        return True

    @property
    def counts(self) -> tuple[str, ...]:
        """Its arguments that are how many tokens the whole step trains."""
        return ()

    @property
    def labelled(self) -> bool:
        """Whether it reads of each sequence that it is good or bad; see `CaseSequence.label`."""
        return False

    @property
    def relative(self) -> bool:
        """Whether it takes rewards, from which it subtracts a baseline, rather than advantages."""
        return False

    @property
    def grouped(self) -> bool:
        """Whether it is told which sequences are a group."""
        return False

    @property
    def against_reference(self) -> bool:
        """Whether its signature sets each response of a pair against a reference."""
        return False

    @cached_property
    def invariances(self) -> tuple[str, ...]:
        """The moves that may not change its gradient."""
        return invariances_of(self)

    @final
    def spread(self, case: Case) -> Case:
        """Return the case with one number for all trained tokens of a sequence, where the loss wants it so."""
        sequences = case.sequences
        for name in self.per_sequence:

            def first(i: int, j: int, x: float, name: str = name) -> float:
                trained = sequences[i].trained()
                return float(getattr(sequences[i], name)[trained[0] if trained else 0])

            case = case.edited(name, first)
        return case

    @abc.abstractmethod
    def arguments(self, case: Case, leaves: Sequence[Tensor], layout: str) -> Any:
        """Return what the loss is called with.

        Args:
            case: the numbers.
            leaves: the log-probs, one tensor per sequence, whose dtype the other inputs have too.
            layout: one of `layouts`.
        """

    @abc.abstractmethod
    def call(self, arguments: Any) -> tuple[Tensor, Mapping[str, Any]]:
        """Return the loss, one number, and its metrics."""

    def with_gradients(self, case: Case, leaves: Sequence[Tensor], layout: str, watched: dict[str, Tensor]) -> Any:
        """Return arguments whose `detached` inputs ask for a gradient, and note these inputs in ``watched``."""
        return self.arguments(case, leaves, layout)

    @final
    def run(self, case: Case, leaves: Sequence[Tensor], layout: str | None = None) -> tuple[Tensor, Mapping[str, Any]]:
        """Build the arguments and call the loss."""
        return self.call(self.arguments(case, leaves, layout or self.layouts[0]))

    @final
    def reduced(self, returned: Any) -> tuple[Tensor, Mapping[str, Any]]:
        """Return the loss, one number, and the metrics of what a function returned; see `loss_and_metrics`."""
        loss, metrics = loss_and_metrics(returned, self.name)
        if loss.dim() == 1:
            self.averaged.add(loss.numel())
            loss = loss.mean()
        return loss, metrics

    @property
    def note(self) -> str:
        """What a report says first: that a loss with a number for each row or pair is checked as their mean."""
        if not self.averaged:
            return ""
        shape = "1" if self.averaged == {1} else "P" if self.paired else "B"
        return f"returns [{shape}]: its mean was checked"

    def loss_of(self, arguments: Any) -> Tensor:
        """Return the loss alone."""
        return self.call(arguments)[0]

    @final
    def value(self, case: Case, leaves: Sequence[Tensor] | None = None) -> Tensor:
        """Return the loss alone, in fp64."""
        return self.loss_of(self.arguments(case, leaves or leaves_of(case), self.layouts[0]))

    @final
    def metrics(self, case: Case) -> Mapping[str, Any]:
        """Return the metrics."""
        return self.run(case, leaves_of(case))[1]

    @final
    def measure(
        self,
        case: Case,
        *,
        dtype: torch.dtype = torch.float64,
        layout: str | None = None,
        step: int = 1,
    ) -> Measured:
        """Return the loss and its gradient.

        Args:
            case: the numbers.
            dtype: of the log-probs.
            layout: one of `layouts`.
            step: by how much more tokens the whole step has than the case; see `counts`.

        Raises:
            Failed: the loss cannot be differentiated.
        """
        leaves = leaves_of(case, dtype)
        arguments = self.arguments(case, leaves, layout or self.layouts[0])
        if step != 1:
            arguments = {**arguments, **{name: arguments[name] * step for name in self.counts}}
        loss = self.loss_of(arguments)
        require_connected(loss)
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
        if loss.dtype != torch.float64:  # it computes in single precision: what is beyond that is noise
            found = tuple(None if slope is None else slope.float() for slope in found)
        rows = tuple(
            torch.zeros(leaf.shape, dtype=torch.float64) if slope is None else slope.detach().double()
            for leaf, slope in zip(leaves, found, strict=True)
        )
        return Measured(float(loss.detach()), rows, tuple(i for i, g in enumerate(found) if g is None))

    @final
    def matters(self, case: Case, field: str) -> bool:
        """Return whether the loss, its gradient or a metric changes where a field has other numbers."""
        by_old = field == "rollout_logprobs" and "old_logprobs" not in self.required
        for with_old in (False, True) if by_old else (True,):
            whole = Case(case.sequences, with_old)
            moved = whole.edited(field, lambda i, j, x: x + _uneven(i, j))
            a, b = self.measure(whole), self.measure(moved)
            if a.value != b.value or bool((a.flat != b.flat).any()) or self._logged(whole) != self._logged(moved):
                return True
        return False

    def _logged(self, case: Case) -> list[float]:
        return [float(x) for x in self.metrics(case).values() if isinstance(x, int | float | Tensor)]

    @cached_property
    def kind(self) -> GradientKind | None:
        """The gradient kind that is measured; None if the loss refuses the numbers of the measurement."""
        try:
            found = [self._dependence(on_policy) for on_policy in (True, False)]
        except Exception:
            return None
        order = ("constant", "token", "sequence", "pair", "batch")
        return max(found, key=order.index)

    @property
    def paired(self) -> bool:
        """Whether sequences 2i and 2i + 1 are one unit."""
        return (self.declared or self.kind) == "pair" or (self.declared is None and self._opposed)

    @cached_property
    def _opposed(self) -> bool:
        """Whether neighbours are pushed apart, and not once they are: a hinge on pairs, of constant gradient before that."""
        if self.kind != "constant" or "advantages" in self.fields or self.labelled:
            return False
        case = kind_case(True)
        at = self.measure(case)
        pushed = [row.sign().unique().tolist() for row in at.rows]
        if pushed not in ([[-1.0], [1.0]] * 2, [[1.0], [-1.0]] * 2):
            return False
        apart = (case.edited("logprobs", lambda i, j, x, side=side: x - _APART * (i % 2 == side)) for side in (0, 1))  # type: ignore[misc]
        return any(not torch.equal(self.measure(each).flat, at.flat) for each in apart)

    @final
    def unit(self) -> int:
        """Return how many sequences there are to a unit."""
        return 2 if self.paired else 1

    def _dependence(self, on_policy: bool) -> GradientKind:
        case = kind_case(on_policy)
        lengths = [len(s.logprobs) for s in case.sequences]
        rows = [i for i, length in enumerate(lengths) for _ in range(length)]

        def gradient(point: Tensor) -> Tensor:
            parts = [part.tolist() for part in torch.split(point, lengths)]
            return self.measure(case.with_logprobs(parts)).flat

        point = torch.tensor([x for s in case.sequences for x in s.logprobs], dtype=torch.float64)
        return dependence(gradient, rows, point, (1e-4,) if on_policy else (0.05, -0.7))


def _uneven(i: int, j: int) -> float:
    """Return a move, in nats, that cancels in no sum or mean over a sequence, and in no difference of two of them."""
    return 0.0371 * (1 + i + 2 * j + 0.37 * i * i)
