"""What a newcomer's loss class may declare or return wrongly: said when it is registered, or when it is first used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pullback.errors import ConfigError, LengthError
from pullback.losses import Loss, Registry, Term, TokenBatch


def loss_class(**changes: Any) -> Any:
    """Return a class of losses with the mean margin of pairs as its value, and some parts of it changed."""

    def terms(self: Any, batch: TokenBatch) -> Any:
        sums, pairs = batch.weighted_row_sum(), batch.pairs
        return (Term("margin", sums[pairs.rejected] - sums[pairs.chosen], "pair", self.main_aggregation),)

    parts: dict[str, Any] = {
        "__annotations__": {"aggregation": "str"},
        "__module__": __name__,
        "aggregation": "pair_mean",
        "name": "margin",
        "gradient_kind": "pair",
        "sources": (),
        "required_inputs": ("weights",),
        "terms": terms,
        **changes,
    }
    return dataclass(frozen=True)(type("Margin", (Loss,), parts))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gradient_kind": "pairs"}, r"gradient_kind of margin must be one of .*did you mean 'pair'"),
        (
            {"required_inputs": ("weights", "reference_logprobs")},
            r"required_inputs of margin has .*did you mean 'ref_logprobs'",
        ),
        ({"required_inputs": ("rollout_logprobs",)}, r"has 'rollout_logprobs' \(did you mean 'logprobs'\?\)"),
        ({"optional_inputs": ("nonsense",)}, "optional_inputs of margin has 'nonsense'; the keys of a datum"),
    ],
)
def test_a_wrong_declaration(changes: dict[str, Any], words: str) -> None:
    """It is refused with what is meant, and leaves no name behind; without it the class is taken."""
    registry = Registry()
    with pytest.raises(ConfigError, match=words):
        registry.register(loss_class(**changes))
    assert registry.names() == ()
    assert registry.register(loss_class(optional_inputs=("group_id",))) is registry.get("margin")


class Unfinished(Loss):
    """A class without its mathematics."""

    name: ClassVar[str] = "unfinished"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (Unfinished, "the loss class Unfinished lacks gradient_kind, required_inputs, terms, aggregation"),
        (3, "a registry takes classes of Loss, got 3"),
        (lambda data, logprobs: (logprobs[0].sum(), {}), "a function goes to forward_backward_custom as it is"),
        (loss_class()(), "takes classes of Loss, got Margin"),
    ],
)
def test_what_is_no_loss_class(given: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Registry().register(given)


@pytest.mark.parametrize("returned", [torch.ones(()), [torch.ones(2)], None, ("margin",)])
def test_terms_are_terms(returned: Any) -> None:
    """A value in the place of the terms is refused by the loss's name."""
    batch = TokenBatch.from_padded(torch.full((2, 2), -1.0), torch.ones(2, 2))
    with pytest.raises(ConfigError, match=r"terms of margin must return a tuple of Term, .*, got "):
        loss_class(terms=lambda self, batch: returned)().evaluate(batch)


@given(st.data())
def test_a_term_has_one_value_for_each_unit(data: st.DataObject) -> None:
    """Otherwise a sum over sequences would be divided by the number of pairs, and broadcasts would count twice."""
    pairs, width = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 4))
    rows = 2 * pairs
    shapes: dict[Any, tuple[int, ...]] = {"token": (rows, width), "sequence": (rows,), "pair": (pairs,)}
    unit = data.draw(st.sampled_from(sorted(shapes)))
    given_shape = data.draw(st.sampled_from([*shapes.values(), (), (1,), (rows, 1), (pairs + 1,)]))
    batch = TokenBatch.from_padded(torch.full((rows, width), -1.0), torch.ones(rows, width))
    if data.draw(st.booleans()):
        ids = {"pair_id": torch.arange(rows) // 2, "role": torch.arange(rows) % 2}
        batch = TokenBatch.from_padded(batch.logprobs, torch.ones(rows, width), **ids)
    term = Term("x", torch.ones(given_shape), unit, "sum")  # type: ignore[arg-type]
    if given_shape == shapes[unit]:
        assert term.numerator(batch).item() == pytest.approx(torch.ones(given_shape).sum().item())
        return
    with pytest.raises(LengthError, match=rf"term 'x' has values of shape .*, one per {unit}"):
        term.numerator(batch)
