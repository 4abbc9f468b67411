"""A second model as the reference: it scores as by itself, and whatever is trained is not part of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import distance, make_data, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pullback.backends import Head, HFModel, TorchBackend
from pullback.backends.native.models.facts.model_facts import ModelFacts
from pullback.datums import Datum
from pullback.errors import ConfigError, InvalidDatumsError, LeakyModelError
from pullback.testing import TinyLM

DATA = make_data([6, 4, 5, 3])


class Plain(nn.Module):
    """A model that keeps sequences apart."""

    facts = ModelFacts()

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.inner = TinyLM(seed=seed)

    def hidden_states(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.inner.hidden_states(tokens, positions)

    def head(self) -> Head:
        return self.inner.head()


class Mixing(Plain):
    """A model that takes whatever lies before in a row for its own text."""

    def hidden_states(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.inner.hidden_states(tokens, torch.arange(tokens.shape[1]).expand_as(tokens))


class Foreseeing(Plain):
    """A model that sees the future."""

    def hidden_states(self, tokens: Tensor, positions: Tensor) -> Tensor:
        hidden = self.inner.hidden_states(tokens, positions)
        return hidden + hidden.mean(1, keepdim=True)


class Short(Plain):
    """A model that was made for four tokens."""

    facts = ModelFacts(max_length=4)


@torch.no_grad()
def scored_alone(model: Plain, datum: Datum) -> Tensor:
    """The log-probs by the definition: one sequence, all logits."""
    tokens, targets = datum.model_input.tokens, datum.loss_fn_inputs["target_tokens"].to_torch()
    hidden = model.hidden_states(tokens[None], torch.arange(len(tokens))[None])[0]
    return (hidden @ model.head().weight.T).log_softmax(-1).gather(-1, targets[:, None])[:, 0]


@settings(max_examples=6)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), kind=st.sampled_from([Plain, Mixing]))
def test_it_scores_as_by_itself(lengths: list[int], kind: type[Plain]) -> None:
    """Whichever layout suits the model that is trained."""
    reference, data = kind(seed=3), make_data(lengths)
    backend = TorchBackend(TinyLM(), reference=reference)
    outputs = backend.reference().forward(data).result().loss_fn_outputs
    for datum, output in zip(data, outputs, strict=True):
        found = output["logprobs"].to_torch().double()
        torch.testing.assert_close(found, scored_alone(reference, datum), atol=2e-6, rtol=0)


def test_another_layout_of_its_own_is_seen() -> None:
    """Negative control: together, the sequences of the mixing model are others."""
    alone, mixing = TorchBackend(TinyLM()), TorchBackend(TinyLM(), reference=Mixing())
    assert "packed" in alone.layouts()
    assert "packed" not in mixing.layouts()
    with pytest.raises(LeakyModelError, match="the reference: sequences see each other"):
        TorchBackend(TinyLM(), reference=Mixing(), layout="packed")


def _same_inside(model: HFModel) -> nn.Module:
    return HFModel(model.model)


def _same_embedding(model: HFModel) -> nn.Module:
    other = copy.deepcopy(model)
    other.model.model.embed_tokens.weight = model.model.model.embed_tokens.weight  # type: ignore[union-attr]
    return other


def _same_memory(model: HFModel) -> nn.Module:
    other = copy.deepcopy(model)
    inner: Any = model.model
    norm: Any = other.model.model.norm
    norm.weight = nn.Parameter(inner.model.norm.weight.data)
    return other


@pytest.mark.parametrize("made", [lambda model: model, _same_inside, _same_embedding, _same_memory])
def test_it_shares_nothing_that_is_trained(made: Callable[[HFModel], nn.Module]) -> None:
    """Freezing the reference would freeze the model, and each step would move the reference."""
    model = tiny_llama()
    with pytest.raises(ConfigError, match="of the model itself that are trained"):
        TorchBackend(model, reference=made(model))
    assert all(p.requires_grad for p in model.parameters())


def test_it_may_share_what_is_frozen() -> None:
    """The embedding of both, for example; the gradient is the one without a reference."""
    model, plain = TinyLM(), TinyLM()
    for each in (model, plain):
        each.embedding.requires_grad_(False)
    reference = copy.deepcopy(model, {id(model.embedding): model.embedding})
    backend, alone = TorchBackend(model, reference=reference), TorchBackend(plain)
    for one in (backend, alone):
        one.forward_backward(DATA, "cross_entropy").result()
    assert reference.embedding is model.embedding
    assert distance(backend.gradients(), alone.gradients()) == 0.0


def test_it_is_a_causal_model() -> None:
    with pytest.raises(LeakyModelError, match="not causal"):
        TorchBackend(TinyLM(), reference=Foreseeing())


def test_its_own_vocabulary_and_context_hold() -> None:
    """Just inside it scores; beyond, the error names the datum and whose limit it is."""
    small = TorchBackend(TinyLM(17), reference=TinyLM(11)).reference()
    assert small.forward(make_data([3, 3], vocab_size=11)).exception() is None
    with pytest.raises(InvalidDatumsError, match=r"for the reference, datum 0: .* ids run from 0 to 10"):
        small.forward(DATA).result()
    short = TorchBackend(TinyLM(), reference=Short()).reference()
    assert short.forward(make_data([4, 3])).exception() is None
    with pytest.raises(InvalidDatumsError, match="for the reference, datum 1: model_input has 5 tokens"):
        short.forward(make_data([4, 5])).result()
