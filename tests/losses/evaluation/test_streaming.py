"""A loss evaluated chunk by chunk of tokens is the loss evaluated at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, final

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pullback.errors import ConfigError, LengthError, LossError, MissingFieldError
from pullback.losses import (
    AGGREGATIONS,
    CISPO,
    DPO,
    DRO,
    GRPO,
    KL,
    PPO,
    CrossEntropy,
    DeferredMetric,
    ImportanceSampling,
    Loss,
    LossOutput,
    Summand,
    Term,
    TokenBatch,
    TokenStream,
    TokenTerm,
    fixed_length,
    preset,
)
from pullback.losses.aggregation import Aggregation
from pullback.losses.base import GradientKind
from pullback.testing import Case
from pullback.testing.strategies import cases

TOKEN_AGGREGATIONS = [*(name for name, known in AGGREGATIONS.items() if known.fits("token")), fixed_length(7)]
MAKERS: list[Callable[[Any], Loss]] = [
    CrossEntropy,
    ImportanceSampling,
    lambda aggregation: PPO(0.2, aggregation),
    lambda aggregation: GRPO(kl=KL("k3", 0.3), aggregation=aggregation),
    lambda aggregation: PPO(0.2, aggregation, 3.0),
    lambda aggregation: CISPO(aggregation=aggregation),
    lambda aggregation: DRO(0.3, aggregation),
    lambda aggregation: GRPO(None, KL("k2", 0.3, "pathwise"), "none", aggregation),
]


@final
@dataclass(frozen=True)
class SurprisingTokens(Loss):
    """Cross-entropy of the trained tokens with a log-prob below -1: its term says which tokens count."""

    aggregation: Aggregation | str = "token_mean"

    name: ClassVar[str] = "surprising_tokens"
    gradient_kind: ClassVar[GradientKind] = "token"
    sources: ClassVar[tuple[str, ...]] = ("this test",)
    required_inputs = ()
    optional_inputs = ("weights",)

    @classmethod
    def from_config(cls) -> Self:
        return cls()

    def terms(self, batch: TokenBatch) -> tuple[Term, ...]:
        where = batch.policy < -1
        values = torch.where(where, -batch.policy, torch.zeros_like(batch.policy))
        return (Term("nll", values, "token", self.main_aggregation, where=where),)


def placeholder(case: Case) -> tuple[TokenBatch, Tensor]:
    """The batch of a case with zeros for log-probs, and its log-probs."""
    batch, leaf = case.batch()
    return batch.with_logprobs(torch.zeros_like(leaf.detach())), leaf.detach()


def streamed(
    loss: Loss, case: Case, chunks: Sequence[slice | Tensor], counts: Mapping[str, float] | None = None
) -> tuple[LossOutput, Tensor]:
    """The output and the cotangent of a case, asked for in chunks."""
    batch, logprobs = placeholder(case)
    stream = TokenStream(loss, batch, counts)
    cotangent = torch.full_like(logprobs, math.nan)
    for at in chunks:
        cotangent[at] = stream.cotangent(logprobs[at], at)
    return stream.output(), cotangent


def at_once(loss: Loss, case: Case, counts: Mapping[str, float] | None = None) -> tuple[LossOutput, Tensor]:
    """The output of `evaluate`, and autograd's cotangent of the numerators (of the loss, with ``counts``)."""
    batch, leaf = case.batch()
    output = loss.evaluate(batch, counts)
    total = output.loss if counts else torch.stack([part.numerator for part in output.parts]).sum()
    (cotangent,) = torch.autograd.grad(total, leaf)
    return output, cotangent


def near(a: Tensor | float, b: Tensor | float) -> bool:
    """True to 1e-12 of the larger norm."""
    a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    # Equal first: the largest ratio of no token is minus infinity.
    return torch.equal(a, b) or bool((a - b).norm() <= 1e-12 * max(1.0, float(b.norm())))


def same(ours: tuple[LossOutput, Tensor], expected: tuple[LossOutput, Tensor]) -> bool:
    """True if value, parts, unreduced values, metrics and cotangent are equal to 1e-12."""
    (output, cotangent), (whole, slope) = ours, expected
    parts = zip(output.parts, whole.parts, strict=True)
    return (
        near(cotangent, slope)
        and near(output.loss, whole.loss.detach())
        and output.empty == whole.empty
        and all(
            (a.name, a.denominator, a.count) == (b.name, b.denominator, b.count)
            and near(a.numerator, b.numerator.detach())
            for a, b in parts
        )
        and output.values.keys() == whole.values.keys()
        and all(torch.equal(output.values[name], whole.values[name]) for name in whole.values)
        and output.metrics.keys() == whole.metrics.keys()
        and all(near(output.metrics[name].numerator, m.numerator) for name, m in whole.metrics.items())
    )


@st.composite
def splits(draw: st.DrawFn, size: int) -> list[slice | Tensor]:
    """Any split of ``size`` tokens into chunks: in order as slices, or shuffled as indices."""
    cuts = sorted(draw(st.lists(st.integers(0, size), max_size=4)))
    edges = list(zip([0, *cuts], [*cuts, size], strict=True))
    if draw(st.booleans()):
        return [slice(*edge) for edge in draw(st.permutations(edges))]
    order = torch.tensor(draw(st.permutations(range(size))), dtype=torch.int64)
    return [order[first:last] for first, last in edges]


@pytest.mark.parametrize("aggregation", TOKEN_AGGREGATIONS, ids=lambda a: a if isinstance(a, str) else a.name)
@given(make=st.sampled_from(MAKERS), data=st.data(), case=cases(empty=True), divide=st.booleans())
def test_streamed_is_evaluated(
    aggregation: Any, make: Callable[[Any], Loss], data: st.DataObject, case: Case, divide: bool
) -> None:
    """Any split of the tokens into chunks, in any aggregation, gives the output and the cotangent of `evaluate`."""
    size, denominator = sum(len(s.logprobs) for s in case.sequences), Aggregation.of(aggregation).denominator
    counts: dict[str, float] | None = {denominator: 1e4} if divide and denominator != "none" else None
    chunks = data.draw(splits(size))
    assert same(streamed(make(aggregation), case, chunks, counts), at_once(make(aggregation), case, counts))


@given(data=st.data(), case=cases())
def test_a_term_may_say_which_tokens_count(data: st.DataObject, case: Case) -> None:
    """A term's ``where`` is joined from its chunks, too."""
    chunks = data.draw(splits(sum(len(s.logprobs) for s in case.sequences)))
    assert same(streamed(SurprisingTokens(), case, chunks), at_once(SurprisingTokens(), case))


def two_answers(weights: Sequence[float] = (1.0, 0.0, 1.0, 1.0, 1.0)) -> TokenBatch:
    """Two answers of three and two tokens, ready for a stream."""
    numbers = torch.linspace(-2, 2, 5, dtype=torch.float64)
    return TokenBatch.from_packed(
        torch.zeros(5, dtype=torch.float64),
        [3, 2],
        weights=torch.tensor(weights),
        advantages=numbers,
        rollout_logprobs=-numbers.abs(),
        ref_logprobs=numbers - 3,
    )


@pytest.mark.parametrize("wrong", ["mean_of_the_chunk", "shifted"])
def test_a_wrong_coefficient_is_noticed(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: coefficients of the chunk instead of the batch, or of the next token, do not pass."""
    case = Case(tuple(_sequence(n) for n in (3, 2)))
    loss, chunks = CrossEntropy("sequence_mean_token_mean"), [slice(0, 2), slice(2, 5)]
    assert same(streamed(loss, case, chunks), at_once(loss, case))
    if wrong == "shifted":
        coefficient = TokenStream._coefficient
        monkeypatch.setattr(TokenStream, "_coefficient", lambda self, term: coefficient(self, term).roll(-1))
    else:
        numerator = TokenTerm.numerator
        monkeypatch.setattr(TokenTerm, "numerator", lambda self, batch, coefficients=None: numerator(self, batch))
    assert not same(streamed(loss, case, chunks), at_once(loss, case))


def _sequence(length: int) -> Any:
    from pullback.testing import CaseSequence

    numbers = [-1.0 - 0.1 * j for j in range(length)]
    return CaseSequence(numbers, [1.0] * length, numbers, numbers, numbers, numbers)


def test_each_token_is_evaluated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The terms are called once per chunk, see each token once, and are not called again for output and metrics."""
    seen: list[list[float]] = []
    described: list[int] = []
    terms, describe = PPO.terms, PPO.describe

    def count_terms(self: PPO, batch: TokenBatch) -> tuple[Summand, ...]:
        seen.append(batch.logprobs.detach().tolist())
        return terms(self, batch)

    def count_describe(self: PPO, batch: TokenBatch) -> Mapping[str, DeferredMetric]:
        described.append(batch.logprobs.numel())
        return describe(self, batch)

    monkeypatch.setattr(PPO, "terms", count_terms)
    monkeypatch.setattr(PPO, "describe", count_describe)
    stream, logprobs = TokenStream(PPO(), two_answers()), -torch.arange(1.0, 6.0, dtype=torch.float64)
    for at in (slice(3, 5), slice(0, 1), slice(1, 3)):
        stream.cotangent(logprobs[at], at)
    output = stream.output()
    assert seen == [[-4, -5], [-1], [-2, -3]]
    assert described == []
    assert output.metrics is output.metrics
    assert described == [5]
    assert len(seen) == 3


def test_another_device_by_default() -> None:
    """A stream stays on the device of its batch, whatever device new tensors are made on."""
    batch = two_answers()
    everywhere = torch.arange(batch.logprobs.numel())
    with torch.device("meta"):
        stream = TokenStream(ImportanceSampling(), batch)
        for at in (slice(0, 2), everywhere[2:]):
            assert stream.cotangent(batch.logprobs[at], at).device.type == "cpu"
        assert stream.output().loss.device.type == "cpu"


def test_a_failed_chunk_can_be_asked_again() -> None:
    """An error in a chunk leaves the stream as it was."""
    stream, full = TokenStream(PPO(), two_answers()), -torch.ones(5, dtype=torch.float64)
    with pytest.raises(RuntimeError):
        stream.cotangent(full.to(torch.int64), slice(0, 5))
    assert stream.cotangent(full, slice(0, 5)).shape == (5,)


def misuse(act: Callable[[TokenStream, Tensor], object]) -> Callable[[], object]:
    return lambda: act(TokenStream(PPO(), two_answers()), -torch.ones(5, dtype=torch.float64))


def twice(stream: TokenStream, logprobs: Tensor) -> None:
    stream.cotangent(logprobs[:3], slice(0, 3))
    stream.cotangent(logprobs[2:], slice(2, 5))


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda: TokenStream(DPO(), two_answers()), ConfigError, "gradient kind 'pair'"),
        (lambda: TokenStream(PPO(), two_answers(), 4), ConfigError, "counts must map"),  # type: ignore[arg-type]
        (lambda: TokenStream(PPO(), TokenBatch.from_packed(torch.zeros(2), [2])), MissingFieldError, "'advantages'"),
        (
            lambda: TokenStream(CrossEntropy(), TokenBatch.from_packed(torch.zeros(2, 3), [2])),
            LengthError,
            "one target",
        ),
        (misuse(twice), LossError, "second time"),
        (misuse(lambda s, lp: s.cotangent(lp[:2], torch.tensor([1, 1]))), LossError, "second time"),
        (misuse(lambda s, lp: s.output()), LossError, "5 of 5 tokens"),
        (misuse(lambda s, lp: (s.cotangent(lp[:2], slice(0, 2)), s.output())), LossError, "3 of 5 tokens.*first at 2"),
        (misuse(lambda s, lp: s.cotangent(lp[:2], slice(0, 3))), LengthError, "one per token"),
        (misuse(lambda s, lp: s.cotangent(lp[:1], torch.tensor([5]))), LengthError, "5 tokens"),
        (
            lambda: TokenStream(CrossEntropy("token_mean"), two_answers(), {"pairs": 1}).cotangent(
                torch.zeros(5), slice(0, 5)
            ),
            ConfigError,
            "divided by tokens, but the totals given are of pairs",
        ),
    ],
)
def test_misuse_is_refused(act: Callable[[], object], error: type[Exception], message: str) -> None:
    """A loss of pairs, a token asked twice, an output before all tokens: each has its own error."""
    with pytest.raises(error, match=message):
        act()


def test_no_tokens() -> None:
    """A batch without a token has an empty output, as `evaluate` has it."""
    batch = TokenBatch.from_packed(torch.zeros(0), [0])
    output = TokenStream(CrossEntropy("token_mean"), batch).output()
    assert output.empty
    assert output.loss.item() == 0.0


def test_presets_stream() -> None:
    """What other projects compute streams too."""
    case = Case(tuple(_sequence(n) for n in (3, 2)))
    for name in ("trl:dapo", "trl:dr_grpo", "seed:grpo"):
        loss = preset(name)
        assert same(streamed(loss, case, [slice(0, 4), slice(4, 5)]), at_once(loss, case))
