"""An adapter on the head is used as it is, or refused in words; tied rows and copies of the head too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("peft", reason="adapters are peft's (extra hf)")

import peft
from pretrained.own_model import largest_error, own_logprobs, sharing_prompt

from pullback.backends import AdamParams, TorchBackend
from pullback.backends.native import HFModel
from pullback.backends.native.models import hf
from pullback.errors import MissingReferenceError, UnsupportedError
from pullback.ops import head
from pullback.testing.models import zoo

DATA = sharing_prompt(6, (5, 3))
HEAD = {"target_modules": ["lm_head"]}
Q = {"r": 4, "target_modules": ["q_proj"]}
USED: dict[str, tuple[bool, Any]] = {
    "lora": (False, lambda: peft.LoraConfig(r=4, **HEAD)),
    "rslora": (False, lambda: peft.LoraConfig(r=4, use_rslora=True, **HEAD)),
    "randlora": (False, lambda: peft.RandLoraConfig(r=4, **HEAD)),
    "loha": (False, lambda: peft.LoHaConfig(r=4, **HEAD)),
    "vera": (False, lambda: peft.VeraConfig(r=4, **HEAD)),
    "a copy": (False, lambda: peft.LoraConfig(**Q, modules_to_save=["lm_head"])),
    "a copy, tied": (True, lambda: peft.LoraConfig(**Q, modules_to_save=["lm_head"])),
    "tied rows": (True, lambda: peft.LoraConfig(**Q, trainable_token_indices=[5, 9])),
    "rows": (False, lambda: peft.LoraConfig(**Q, trainable_token_indices={"lm_head": [5], "embed_tokens": [5, 9]})),
}
REFUSED: dict[str, Any] = {
    "dora": lambda: peft.LoraConfig(r=4, use_dora=True, **HEAD),
    "lora_bias": lambda: peft.LoraConfig(r=4, lora_bias=True, **HEAD),
    "oft": lambda: peft.OFTConfig(r=4, oft_block_size=0, **HEAD),
    "hra": lambda: peft.HRAConfig(r=4, **HEAD),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, **HEAD),
    "ia3": lambda: peft.IA3Config(feedforward_modules=[], **HEAD),
}


def adapted(config: Any, tied: bool = False) -> Any:
    """A tiny Llama with an adapter."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return peft.get_peft_model(zoo.build("llama", tie_word_embeddings=tied), config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@settings(max_examples=6)
@given(std=st.sampled_from([0.0, 1e-4, 1e-3, 1e-2, 1e-1]))
@torch.no_grad()
def test_a_small_change_of_a_half_precision_head(dtype: torch.dtype, std: float) -> None:
    """However little an adapter has learned, all of it is in the log-probs; where that is nothing they are the reference's."""
    model = adapted(peft.LoraConfig(r=4, lora_alpha=4, **HEAD)).to(dtype)
    head = model.get_base_model().get_output_embeddings()
    a, b = (part["default"].float().weight for part in (head.lora_A, head.lora_B))
    b.copy_(std * torch.randn(b.shape, generator=torch.Generator().manual_seed(0)))
    hf_model, whole = HFModel(model), head.base_layer.weight.double() + b.double() @ a.double()
    backend = TorchBackend(hf_model, layout="single")
    outputs = [each.forward(DATA).result().loss_fn_outputs for each in (backend, backend.reference())]
    found, reference = ([output["logprobs"] for output in each] for each in outputs)
    for datum, logprobs in zip(DATA, found, strict=True):
        tokens, targets = datum.model_input.tokens, datum.loss_fn_inputs["target_tokens"].to_torch()
        hidden = hf_model.hidden_states(tokens[None], torch.arange(len(tokens))[None])[0].double()
        wanted = (hidden @ whole.T).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        torch.testing.assert_close(logprobs.to_torch().double(), wanted, atol=1e-5, rtol=1e-5)
    assert (found == reference) == (std == 0.0)


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft's, of tied weights
@pytest.mark.parametrize(("tied", "config"), USED.values(), ids=USED.keys())
def test_a_head_that_is_used(tied: bool, config: Any) -> None:
    """Log-probs after training are the peft model's own, and the gradient is plain autograd's."""
    model = adapted(config(), tied)
    backend = TorchBackend(HFModel(model))
    for _ in range(3):
        backend.forward_backward(DATA, "cross_entropy").result()
        backend.optim_step(AdamParams(learning_rate=1e-2)).result()
    assert largest_error(backend, model, DATA) < 1e-5
    backend.forward_backward(DATA, "cross_entropy").result()
    ours = backend.gradients()
    trained = {name: p for name, p in backend.model.named_parameters() if p.requires_grad}
    weights = [datum.loss_fn_inputs["weights"].to_torch() for datum in DATA]
    loss = -sum((own_logprobs(model, datum) * w).sum() for datum, w in zip(DATA, weights, strict=True))
    assert isinstance(loss, torch.Tensor)
    plain = dict(zip(trained, torch.autograd.grad(loss, list(trained.values()), allow_unused=True), strict=True))
    for name, gradient in ours.items():
        expected = plain[name]
        assert expected is not None
        assert float((gradient - expected).norm()) <= 1e-5 * float(expected.norm()) + 1e-7, name
    assert any("lm_head" in name or "token" in name for name in ours)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("config", REFUSED.values(), ids=REFUSED.keys())
def test_a_head_that_is_no_sum_is_refused(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """At their start they are the identity; moved away from it they are refused, and the words say what to leave out."""
    with pytest.raises(UnsupportedError, match="target_modules"):
        HFModel(adapted(config()))
    if config is REFUSED["dora"]:  # negative control: what is neither named nor moved is not seen
        monkeypatch.setattr(head, "_require_matrix", lambda *_: None)
        with pytest.raises(UnsupportedError, match="target_modules"):
            HFModel(adapted(config()))
        monkeypatch.setattr(hf, "perturbed_adapters", lambda model: torch.no_grad())
        HFModel(adapted(config()))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("config", REFUSED.values(), ids=REFUSED.keys())
def test_on_other_layers_they_are_used(config: Any) -> None:
    """The same adapters on an attention layer train, and are right."""
    settings = config()
    settings.target_modules = {"q_proj"}
    model = adapted(settings)
    backend = TorchBackend(HFModel(model))
    for _ in range(2):
        backend.forward_backward(DATA, "cross_entropy").result()
        backend.optim_step(AdamParams(learning_rate=1e-2)).result()
    assert largest_error(backend, model, DATA) < 1e-5


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft's, of tied weights
@pytest.mark.parametrize("kind", USED)
def test_a_head_whose_adapter_is_merged(kind: str) -> None:
    """The adapter is in the base's weight already, and would be added a second time; the base is then no reference."""
    tied, config = USED[kind]
    model = HFModel(adapted(config(), tied))
    with torch.no_grad(), torch.random.fork_rng():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    backend = TorchBackend(model)
    expected = backend.forward(DATA).result().loss_fn_outputs
    model.model.merge_adapter()  # type: ignore[operator]  # peft's
    found = backend.forward(DATA).result().loss_fn_outputs
    for one, other in zip(found, expected, strict=True):
        assert float((one["logprobs"].to_torch() - other["logprobs"].to_torch()).abs().max()) < 1e-4
    with pytest.raises(MissingReferenceError, match="is merged into the base"):
        backend.reference().forward(DATA, "cross_entropy").result()
