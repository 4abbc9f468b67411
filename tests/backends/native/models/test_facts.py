"""What configs say of lengths, and that a model is after its probes what it was before."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch

pytest.importorskip("peft", reason="configs and adapters are transformers' and peft's (extra hf)")

import peft

from pullback.backends import TorchBackend
from pullback.backends.native import HFModel
from pullback.backends.native.models.facts import probes
from pullback.backends.native.models.facts.model_facts import ModelFacts, attention_width, read_facts
from pullback.backends.native.models.facts.probes import layout_limits, require_causal
from pullback.errors import UnsupportedError
from pullback.testing.models import zoo


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", {"max_length": 512}),
        ("mistral", {"window": 8, "max_length": 512}),
        ("llama4_text", {"chunk": 8, "max_length": 512}),
        ("gemma3", {"window": 8, "max_length": 512}),  # in its text_config
        ("gpt2", {"max_length": 512}),
        ("rwkv", {"max_length": None}),
        ("mamba", {"max_length": None}),
        ("gemma4_text", {"window": 8, "max_length": 512}),  # whose config refuses fields that differ by layer
    ],
)
def test_lengths_of_a_config(name: str, expected: dict[str, int | None]) -> None:
    """Windows, chunks and contexts, nested or under older names; what a config lacks is None."""
    config = zoo.tiny_config(name, window=8)
    facts = read_facts(config)
    found = {key: getattr(facts, key) for key in ("window", "chunk", "longrope", "dynamic_rope", "max_length")}
    if name != "rwkv":  # its context is only its kernel's
        assert found == {**dict.fromkeys(found), **expected}
    assert attention_width(config) >= 0.0
    assert read_facts(object()) == ModelFacts()


def test_functional_dropout_is_named() -> None:
    """Probabilities that are not zero, by the config's own names."""
    assert set(read_facts(zoo.tiny_config("opt", dropout=0.1, attention_dropout=0.0)).dropouts) == {"dropout"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_the_same_after_its_probes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights to the bit, precision, window and adapters; with the window made short too."""
    monkeypatch.setattr(probes, "_AFFORDABLE", 0.0)
    lora: Any = peft.LoraConfig(r=2, target_modules="all-linear")
    model = HFModel(peft.get_peft_model(zoo.build("mistral", window=300).to(dtype), lora))

    def digest() -> str:
        sums = hashlib.sha256()
        for name, tensor in model.state_dict().items():
            sums.update(f"{name}{tensor.dtype}".encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return sums.hexdigest()

    before, facts = digest(), model.facts
    require_causal(model, 64)
    assert layout_limits(model, 64).longest == {"packed": None, "forked": None, "padded": None}
    assert digest() == before
    assert (model.facts, model.config.sliding_window) == (facts, 300)


def test_a_layout_in_which_a_model_raises_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe that raises does not end the load; the reason is kept."""
    model = HFModel(zoo.build("llama"))

    def broken(*_: Any) -> Any:
        raise TypeError("no such input")

    monkeypatch.setattr(HFModel, "_packed_states", broken)
    limits = layout_limits(model, 64)
    assert limits.allowed() == ("padded", "single")
    assert limits.reasons["packed"] == "TypeError: no such input"
    assert TorchBackend(model).model is model


def test_a_cap_under_another_name_is_refused_in_half_precision() -> None:
    """Logits capped where the config's usual field does not say so are found in fp32, whatever the weights are."""
    model = zoo.build("recurrent_gemma").to(torch.bfloat16)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    with pytest.raises(UnsupportedError, match="does not compute its logits"):
        HFModel(model)
