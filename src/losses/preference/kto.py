"""KTO: answers that are labelled one by one, desirable or not, against a reference."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from ...errors import InvalidDatumsError
from ..aggregation import Aggregation, Unit
from ..base import GradientKind, Loss
from ..batch.problems import Problem
from ..batch.token_batch import TokenBatch
from ..checks import choice, number
from ..evaluation.metrics import DeferredMetric
from ..evaluation.sequence_terms import SequenceTerm
from ..evaluation.terms import Summand
from ..functional.preference import kto
from ..registry import register
from .pairs import wrong_reference_sums

__all__ = ["KTO"]


@register
@final
@dataclass(frozen=True)
class KTO(Loss):
    r"""Kahneman-Tversky optimisation, ``v (1 - sigmoid(z))`` averaged over labelled sequences, ``z = +- beta (h - z0)``.

    h = ``sum_t w_t (logprob_t - ref_logprob_t)``, summed in fp64. The sign is + and v the ``desirable_weight`` where the label
    is 1, - and ``undesirable_weight`` where it is 0. The gradient with respect to a log-prob is ``-+ v beta w s(z) s(-z)``
    by the number of sequences. A sequence without a trained token has no value, and does not count.

    z0 is the KL of the policy that is trained and the reference. It is an input, ``reference_point``, and not estimated from
    the call: so an update does not depend on how a step is cut into calls. `pullback.with_reference_point` measures it.

    Args:
        beta: how soon the value of an answer saturates, > 0.
        desirable_weight, undesirable_weight: v of each label, > 0; times the number of answers of that label, they should be
            about equal (equation 8 of the paper: desirable at most 4/3 of undesirable).
        baseline: ``given``: each datum has its ``reference_point``; ``zero``: z0 is 0, as in APO-zero for unpaired answers.
        aggregation: ``sequence_mean`` or ``sum``.

    Raises:
        InvalidDatumsError: (on use) a label is neither 0 nor 1, or a reference point is negative or not finite.

    Source: KTO, arXiv:2402.01306, equation 7; with ``baseline="zero"``: APO, arXiv:2408.06266, unpaired.
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    baseline: Literal["given", "zero"] = "given"
    aggregation: Aggregation | str = "sequence_mean"

    name: ClassVar[str] = "kto"
    gradient_kind: ClassVar[GradientKind] = "sequence"
    unit: ClassVar[Unit] = "sequence"
    sources: ClassVar[tuple[str, ...]] = ("arXiv:2402.01306", "arXiv:2408.06266")
    alternative_inputs: ClassVar[Mapping[str, str]] = MappingProxyType({"ref_logprobs": "ref_logprob_sums"})

    def __post_init__(self) -> None:
        for name in ("beta", "desirable_weight", "undesirable_weight"):
            number(name, getattr(self, name), low=0.0)
        choice("baseline", self.baseline, ("given", "zero"))
        object.__setattr__(self, "aggregation", Aggregation.of(self.aggregation, "sequence"))

    @property
    def required_inputs(self) -> tuple[str, ...]:
        always = ("weights", "ref_logprobs", "label")
        return (*always, "reference_point") if self.baseline == "given" else always

    def terms(self, batch: TokenBatch) -> tuple[Summand, ...]:
        args = (batch.label, self._reference_point(batch), self.beta, self.desirable_weight, self.undesirable_weight)
        return (SequenceTerm("kto", kto, "ref_logprobs", args, self.main_aggregation),)

    def problems(self, batch: TokenBatch) -> Iterable[Problem | None]:
        assert batch.label is not None
        yield wrong_reference_sums(batch)
        counts = batch.tokens_per_sequence > 0
        unknown = (batch.label != 0) & (batch.label != 1) & counts
        yield _wrong("label", batch.label, unknown, "1 (desirable) or 0 (undesirable)")
        if self.baseline == "given":
            point = batch.reference_point
            assert point is not None
            words = "a KL, a finite number of at least 0; see pullback.losses.functional.reference_point"
            yield _wrong("reference_point", point, (~torch.isfinite(point) | (point < 0)) & counts, words)

    def describe(self, batch: TokenBatch) -> Mapping[str, DeferredMetric]:
        assert batch.label is not None
        counted = (batch.tokens_per_sequence > 0).double()
        rewards = self.beta * torch.where(counted > 0, batch.weighted_row_sum("ref_logprobs"), 0.0)
        desirable = batch.label.double() * counted
        others = counted - desirable
        return {
            "reward_desirable": DeferredMetric((rewards * desirable).sum(), desirable.sum(), "mean"),
            "reward_undesirable": DeferredMetric((rewards * others).sum(), others.sum(), "mean"),
            "reference_point": DeferredMetric((counted * self._reference_point(batch)).sum(), counted.sum(), "mean"),
            "desirable": DeferredMetric(desirable.sum(), counted.sum(), "mean"),
        }

    def _reference_point(self, batch: TokenBatch) -> Tensor | float:
        return 0.0 if self.baseline == "zero" or batch.reference_point is None else batch.reference_point


def _wrong(name: str, values: Tensor, wrong: Tensor, expected: str) -> Problem:
    def error() -> InvalidDatumsError:
        places = wrong.nonzero()[:, 0].tolist()
        return InvalidDatumsError([f"sequence {i}: {name} is {float(values[i]):g}; it is {expected}" for i in places])

    return Problem(wrong.any(), error)
