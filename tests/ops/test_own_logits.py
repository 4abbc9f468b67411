"""A model whose logits are not its head's alone is refused, also where its logits do not show it yet."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from pullback.backends import HFModel
from pullback.errors import ConfigError, UnsupportedError
from pullback.ops import Head, logprobs_from_logits, logprobs_of
from pullback.ops.own_logits import distance_to_own
from pullback.testing import random_llama
from pullback.testing.models.zoo import build

IDS = torch.tensor([[5, 9, 2, 7, 7, 1], [3, 3, 8, 0, 0, 0]])
REFUSED = "not compute its logits as hidden states times a head"


class Bounded(LlamaForCausalLM):  # type: ignore[misc]  # transformers is not typed here
    """Bounds its logits, of which its config says nothing that is known."""

    bound = 30.0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        outputs.logits = self.bound * torch.tanh(outputs.logits / self.bound)
        return outputs


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gain", [0.01, 1.0, 20.0])
def test_a_bound_that_small_logits_never_meet_is_refused(gain: float, dtype: torch.dtype) -> None:
    """Logits at the start of training, or in half precision, do not show it; one that the config names is right."""
    model = random_llama(vocab_size=64, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(gain)
    model.__class__ = Bounded
    model = model.to(dtype)
    for refusing in (lambda: logprobs_of(model, IDS, IDS), lambda: HFModel(model)):
        with pytest.raises(UnsupportedError, match=REFUSED):
            refusing()
    model.config.final_logit_softcapping = 30.0
    own = logprobs_from_logits(model(IDS).logits, IDS)
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-4}.get(dtype, 0.05)
    assert (logprobs_of(model, IDS, IDS) - own).abs().max() < tolerance
    assert (logprobs_of(model, IDS, IDS) - own).abs().max() < tolerance  # compared already
    HFModel(model)


SIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "above": lambda logits: logits.clamp(max=30.0),
    "below": lambda logits: logits.clamp(min=-30.0),
}


@pytest.mark.parametrize("side", SIDES)
def test_a_bound_on_one_side_is_refused(side: str) -> None:
    """Large logits of both signs are tried."""

    class OneSided(LlamaForCausalLM):  # type: ignore[misc]  # transformers is not typed here
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            outputs = super().forward(*args, **kwargs)
            outputs.logits = SIDES[side](outputs.logits)
            return outputs

    model = random_llama(vocab_size=64, tie_word_embeddings=False)
    model.__class__ = OneSided
    with pytest.raises(UnsupportedError, match=REFUSED):
        logprobs_of(model, IDS, IDS)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_logits_that_are_not_finite_are_far_from_ours(at: int, bad: float) -> None:
    """Wherever they stand: a NaN is larger than no limit."""
    hidden, weight = torch.ones(1, 3, 2), torch.ones(4, 2)
    theirs = hidden @ weight.T
    assert distance_to_own(hidden, Head(weight), [theirs], theirs) == 0.0
    theirs[0, at, 0] = bad
    assert distance_to_own(hidden, Head(weight), [hidden @ weight.T], theirs) == math.inf


def test_a_head_of_zeros_is_known() -> None:
    """As some begin: there is no scale to compare with."""
    model = random_llama(vocab_size=64, tie_word_embeddings=False)
    torch.nn.init.zeros_(model.lm_head.weight)
    assert logprobs_of(model, IDS, IDS).allclose(-torch.tensor(64.0).log())


def test_the_models_head_computes_no_more_than_is_compared() -> None:
    """Two positions of each sequence in the first call, and one later."""
    model = random_llama(vocab_size=64)
    computed: list[int] = []
    model.lm_head.register_forward_hook(lambda module, given, logits: computed.append(logits.shape[1]))
    for _ in range(3):
        logprobs_of(model, IDS, IDS)
    assert computed == [2, 1, 1]


def _not_called(self: Any, hidden: Tensor) -> Tensor:
    logits: Tensor = hidden @ self.lm_head.weight.T
    return logits


def _called_twice(self: Any, hidden: Tensor) -> Tensor:
    return self.lm_head(hidden) + 0 * self.lm_head(hidden)  # type: ignore[no-any-return]


def _of_the_last(self: Any, hidden: Tensor) -> Tensor:
    return self.lm_head(hidden[:, -1:])  # type: ignore[no-any-return]


@pytest.mark.parametrize("logits", [_not_called, _called_twice, _of_the_last])
def test_a_head_that_does_not_get_all_hidden_states_at_once_is_refused(logits: Callable[[Any, Tensor], Tensor]) -> None:
    class Another(LlamaForCausalLM):  # type: ignore[misc]  # transformers is not typed here
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return CausalLMOutputWithPast(logits=logits(self, self.model(*args, **kwargs).last_hidden_state))

    model = random_llama(vocab_size=64, tie_word_embeddings=False)
    model.__class__ = Another
    with pytest.raises(UnsupportedError, match="not all hidden states in one call"):
        logprobs_of(model, IDS, IDS)


def test_one_token_compares_nothing() -> None:
    """A row of one token has no second position to compare at; a longer one that follows is compared."""
    model = random_llama(vocab_size=64, tie_word_embeddings=False)
    model.__class__ = Bounded
    assert logprobs_of(model, IDS[:, :1], IDS[:, :1]).shape == (2, 0)
    with pytest.raises(UnsupportedError, match=REFUSED):
        logprobs_of(model, IDS, IDS)


class Cut(LlamaForCausalLM):  # type: ignore[misc]
    """Leaves out the logits of rows that only fill its head up."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits[..., :60]
        return outputs


def test_logits_of_another_vocabulary_are_refused() -> None:
    """The rows beyond would take part in each log-prob."""
    model = random_llama(vocab_size=64)
    model.__class__ = Cut
    for refusing in (lambda: logprobs_of(model, IDS, IDS), lambda: HFModel(model)):
        with pytest.raises(UnsupportedError, match="returns 60 logits of each token, and its head has 64 rows"):
            refusing()


def test_a_head_without_numbers_is_refused() -> None:
    """accelerate keeps weights elsewhere until their forward."""
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(random_llama(vocab_size=64), execution_device=torch.device("cpu"))
    with pytest.raises(UnsupportedError, match="the head's weight is on the device meta"):
        logprobs_of(model, IDS, IDS)


@pytest.mark.parametrize("name", ["logits_to_keep", "num_logits_to_keep", "return_dict"])
def test_what_is_its_own_is_not_taken_from_others(name: str) -> None:
    """Some of the logits, and outputs without names."""
    with pytest.raises(ConfigError, match=f"leave out {name}"):
        logprobs_of(random_llama(vocab_size=64), IDS, IDS, **{name: False})


class Doubled(torch.nn.Linear):
    """Answers twice what its weight says."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(hidden)


def test_what_has_changed_is_compared_again() -> None:
    """Another head, or another bound or scale in the config, than when the model was compared."""
    changed = [random_llama(vocab_size=64, tie_word_embeddings=False) for _ in range(3)]
    for model in changed:
        logprobs_of(model, IDS, IDS)
    changed[0].lm_head = Doubled(changed[0].config.hidden_size, 64, bias=False)
    changed[1].config.final_logit_softcapping = 5.0
    for model in changed[:2]:
        with pytest.raises(UnsupportedError, match=REFUSED):
            logprobs_of(model, IDS, IDS)
    changed[2].config.logits_scaling = 3.0  # Llama does not apply it
    own = logprobs_from_logits(changed[2](IDS).logits, IDS)
    assert (logprobs_of(changed[2], IDS, IDS) - own).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["minicpm3", "granite", "gemma2"])
def test_scales_and_bounds_that_configs_name_are_known(name: str) -> None:
    """On what the head is given (MiniCPM 3), on its answers, and a bound."""
    HFModel(build(name))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's, on what it breaks its graphs at
def test_a_compiled_step_may_compare() -> None:
    """The compiler breaks its graphs there: the first call, which compares, and later ones give what they give without it."""
    models = [random_llama(vocab_size=64) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    compiled = torch.compile(lambda: logprobs_of(models[0], IDS, IDS), backend="eager")
    for _ in range(2):
        ours, own = compiled(), logprobs_of(models[1], IDS, IDS)
        torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-6)
        found, exact = (
            torch.autograd.grad(x.square().sum(), list(model.parameters()))
            for x, model in zip((ours, own), models, strict=True)
        )
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-6)
    torch._dynamo.reset()
    bounded = random_llama(vocab_size=64)
    bounded.__class__ = Bounded
    with pytest.raises(UnsupportedError, match=REFUSED):
        torch.compile(lambda: logprobs_of(bounded, IDS, IDS), backend="eager")()
    torch._dynamo.reset()
