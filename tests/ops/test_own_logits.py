"""A model whose logits are not its head's alone is refused, also where its logits do not show it yet."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from pullback.backends import HFModel
from pullback.errors import UnsupportedError
from pullback.ops import logprobs_from_logits, logprobs_of
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


def test_one_token_compares_nothing() -> None:
    """A row of one token has no second position to compare at; a longer one that follows is compared."""
    model = random_llama(vocab_size=64, tie_word_embeddings=False)
    model.__class__ = Bounded
    assert logprobs_of(model, IDS[:, :1], IDS[:, :1]).shape == (2, 0)
    with pytest.raises(UnsupportedError, match=REFUSED):
        logprobs_of(model, IDS, IDS)


@pytest.mark.parametrize("name", ["minicpm3", "granite", "gemma2"])
def test_scales_and_bounds_that_configs_name_are_known(name: str) -> None:
    """On what the head is given (MiniCPM 3), on its answers, and a bound."""
    HFModel(build(name))
