"""Sampling with a cache where that gives what the model's own forward gives, without one elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="caches are transformers' own (extra hf)")

from pullback.backends import SamplingParams, TorchBackend
from pullback.backends.native import HFModel
from pullback.backends.native.decoding import agreement
from pullback.datums import ModelInput
from pullback.errors import InvalidDatumsError
from pullback.testing.models import zoo

KINDS: dict[str, tuple[bool, dict[str, Any]]] = {
    "llama": (True, {}),
    "mistral": (True, {}),
    "gemma3_text": (True, {}),
    "lfm2": (False, {"layer_types": ["conv", "full_attention"]}),
    "mamba": (False, {}),
    "qwen3_next": (False, {}),
    "bart": (False, {}),
    "rwkv": (False, {}),
    "openai-gpt": (False, {}),
}


def sampled_error(model: HFModel, plain: Any) -> float:
    """Largest difference, in nats, of a rollout's log-probs from the model's own; prompts of several lengths."""
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 60, (n,), generator=generator) for n in (20, 3, 11)]
    params = SamplingParams(max_tokens=10, seed=0, stop=[])
    worst = 0.0
    with torch.no_grad():
        for one in TorchBackend(model).sample([ModelInput.from_ints(p) for p in prompts], 2, params).result():
            tokens = torch.cat([prompts[one.prompt_index], torch.tensor(one.tokens)])
            logits = plain(input_ids=tokens[None, :-1], use_cache=False).logits[0].log_softmax(-1)
            own = logits.gather(-1, tokens[1:, None])[-len(one.tokens) :, 0]
            worst = max(worst, float((own - torch.tensor(one.logprobs)).abs().max()))
    return worst


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", KINDS)
def test_rollouts_are_the_models_own(name: str) -> None:
    """Log-probs of rollouts are those of a forward, on models with and without a cache that behaves."""
    cached, changes = KINDS[name]
    model, plain = (zoo.build(name, window=8, **changes) for _ in range(2))
    wrapped = HFModel(model)
    assert sampled_error(wrapped, plain.eval()) < 1e-4
    assert agreement.cache_agrees(wrapped) == cached


def test_a_cache_that_ignores_padding_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: positions that count the padding give other log-probs, and are found when first sampled."""
    states = HFModel.cached_states

    def unpadded(self: HFModel, tokens: Any, mask: Any, positions: Any, cache: Any) -> Any:
        return states(self, tokens, torch.ones_like(mask), positions, cache)

    monkeypatch.setattr(HFModel, "cached_states", unpadded)
    model, plain = (zoo.build("llama") for _ in range(2))
    wrapped = HFModel(model)
    assert sampled_error(wrapped, plain.eval()) < 1e-4
    assert not agreement.cache_agrees(wrapped)
    monkeypatch.setattr(agreement, "cache_agrees", lambda model: True)
    assert sampled_error(wrapped, plain) > 1e-2


def test_texts_beyond_the_context_are_refused() -> None:
    """A prompt and its completion that leave the model's positions are refused in words, before anything is drawn."""
    backend = TorchBackend(HFModel(zoo.build("gpt2", n_positions=16)))
    params = SamplingParams(max_tokens=7, seed=0, stop=[])
    assert len(backend.sample([ModelInput.from_ints(range(10))], 1, params).result()[0].tokens) == 7
    with pytest.raises(InvalidDatumsError, match="context of 16 tokens"):
        backend.sample([ModelInput.from_ints(range(11))], 1, params).result()
