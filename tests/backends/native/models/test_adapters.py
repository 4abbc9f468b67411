"""A model below its adapter is a reference only as long as it is the base; a saved adapter is the same function or not."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("peft", reason="adapters are peft's (extra hf)")

import peft
from pretrained.own_model import sharing_prompt

from pullback.backends import TorchBackend, with_reference
from pullback.backends.native import HFModel
from pullback.backends.native.models import hf
from pullback.backends.native.models.adapters import adapter_differences
from pullback.errors import MissingReferenceError
from pullback.testing.models import zoo

DATA = sharing_prompt(6, (5, 3))


def adapted(**changes: Any) -> Any:
    """A tiny Llama with LoRA on its attention."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **changes})
    return peft.get_peft_model(zoo.build("qwen2"), config)


@pytest.mark.parametrize("start", ["pissa", "olora", "pissa_niter_4"])
def test_a_start_that_changes_the_base_is_no_reference(start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PiSSA and OLoRA take the adapter out of the base: adapter off is another model, and is refused."""
    backend = TorchBackend(HFModel(adapted(init_lora_weights=start)))
    with pytest.raises(MissingReferenceError, match=f"init_lora_weights='{start}'"):
        with_reference(DATA, backend.reference())
    monkeypatch.setattr(hf, "require_frozen_base", lambda model: None)  # negative control: at the start they must agree
    assert gap(backend) > 1e-3


@pytest.mark.parametrize("what", ["embed_tokens", "norm", "bias"])
def test_trained_base_weights_are_no_reference(what: str) -> None:
    """Embeddings, norms or biases that are trained beside the adapter move the reference, and are refused."""
    model = adapted(bias="all") if what == "bias" else adapted()
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad or what in name)
    with pytest.raises(MissingReferenceError, match="trained beside the adapter"):
        with_reference(DATA, TorchBackend(HFModel(model)).reference())


def gap(backend: TorchBackend) -> float:
    """Largest difference between policy and reference, nats."""
    own = backend.forward(DATA).result().loss_fn_outputs
    scored = with_reference(DATA, backend.reference())
    pairs = zip(own, scored, strict=True)
    return max(
        float((o["logprobs"].to_torch() - d.loss_fn_inputs["ref_logprobs"].to_torch()).abs().max()) for o, d in pairs
    )


def test_a_fresh_adapter_is_its_reference() -> None:
    """LoRA at its start is the base; copies that peft keeps of trained modules do not count as the base."""
    assert gap(TorchBackend(HFModel(adapted()))) < 1e-6


@pytest.mark.parametrize(
    "changes",
    [{"lora_alpha": 32}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 64}}, {"init_lora_weights": "pissa"}],
)
def test_another_function_of_the_same_weights_is_told_apart(changes: dict[str, Any]) -> None:
    """Alpha, its scaling and patterns, and a start that changes the base, are named; the same config differs in nothing."""
    saved = peft.LoraConfig(r=4, lora_alpha=8).to_dict()
    assert adapter_differences(saved, peft.LoraConfig(r=4, lora_alpha=8).to_dict()) == []
    assert adapter_differences(saved, peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights="gaussian").to_dict()) == []
    (difference,) = adapter_differences(saved, peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **changes}).to_dict())
    assert next(iter(changes)) in difference
