"""Heads that are more than a weight and a bias: refused where they train more, and right where a matrix is added or made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.utils import prune

from pullback.errors import UnsupportedError
from pullback.ops import Head, logprobs_from_logits, logprobs_of
from pullback.testing import random_llama
from pullback.testing.models.zoo import build

IDS = torch.tensor([[5, 9, 2, 7, 7, 1], [3, 3, 8, 0, 0, 0]])


@pytest.mark.parametrize("adapted", [False, True])
def test_a_head_that_trains_more_than_a_matrix_is_refused(adapted: bool) -> None:
    """Dory learns a scale for each token, which is 1 at its start, where the model is compared; a frozen one is right."""
    model: Any = build("dory")
    scale = model.lm_head.logit_scale
    if adapted:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["lm_head"]))
        scale.requires_grad_(True)
    for refusing in (lambda: logprobs_of(model, IDS, IDS), lambda: Head.of(model)):
        with pytest.raises(UnsupportedError, match="trains logit_scale beside its weight and its bias"):
            refusing()
    scale.requires_grad_(False)
    own = logprobs_from_logits(model(input_ids=IDS).logits, IDS)
    assert (logprobs_of(model, IDS, IDS) - own).abs().max() < 1e-4


@pytest.mark.parametrize("on_head", [False, True])
def test_an_adapter_for_each_row_is_refused_on_the_head(on_head: bool) -> None:
    """Below the head it is the model's own matter, and right."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["lm_head" if on_head else "q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(random_llama(vocab_size=64, tie_word_embeddings=False), config)
    model.add_adapter("other", config)
    names = ["default", "other"]
    with torch.no_grad():
        own = logprobs_from_logits(model.eval()(input_ids=IDS, adapter_names=names).logits, IDS)
        if on_head:
            with pytest.raises(UnsupportedError, match="adapter_names chooses an adapter for each row"):
                logprobs_of(model, IDS, IDS, adapter_names=names)
        else:
            assert (logprobs_of(model, IDS, IDS, adapter_names=names) - own).abs().max() < 1e-4


MADE: dict[str, Callable[[torch.nn.Module], object]] = {
    "weight_norm by a hook": torch.nn.utils.weight_norm,
    "weight_norm": torch.nn.utils.parametrizations.weight_norm,
    "pruning": lambda head: prune.random_unstructured(head, "weight", 0.5),
    "pruning of the bias": lambda head: prune.random_unstructured(head, "bias", 0.5),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("kind", MADE)
def test_a_weight_that_each_forward_makes_is_that_of_this_forward(kind: str) -> None:
    """Values and gradients follow each step of what the weight is made of, with a graph or without."""
    model = random_llama(vocab_size=64, tie_word_embeddings=False)
    model.lm_head = torch.nn.Linear(model.config.hidden_size, 64)
    MADE[kind](model.lm_head)
    trained = list(model.parameters())
    for _ in range(2):
        ours, own = logprobs_of(model, IDS, IDS), logprobs_from_logits(model(IDS).logits, IDS)
        exact = torch.autograd.grad(own.sum(), trained)
        for a, b in zip(torch.autograd.grad(ours.sum(), trained), exact, strict=True):
            assert (a - b).norm() < 1e-4 * b.norm()
        with torch.no_grad():
            for p in trained:
                p.mul_(1.5)
            reference, own = logprobs_of(model, IDS, IDS), logprobs_from_logits(model(IDS).logits, IDS)
        assert (reference - own).abs().max() < 1e-4


ADDED: dict[str, dict[str, Any]] = {"LoraConfig": {"lora_alpha": 5}, "LoHaConfig": {"alpha": 3}, "VeraConfig": {}}
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "DoRA": ("LoraConfig", {"use_dora": True}),
    "a bias": ("LoraConfig", {"lora_bias": True}),
    "dropout": ("LoraConfig", {"lora_dropout": 0.5}),
    "dropout of ranks": ("LoHaConfig", {"rank_dropout": 0.5}),
    "dropout of the module": ("LoKrConfig", {"module_dropout": 0.5}),
    "dropout of VeRA": ("VeraConfig", {"vera_dropout": 0.5}),
}


def adapted(config: str, **options: Any) -> Any:
    """A model in training, with an adapter on its head that has not changed it yet."""
    peft = pytest.importorskip("peft")
    model = random_llama(vocab_size=64, tie_word_embeddings=False)
    model.lm_head = torch.nn.Linear(model.lm_head.in_features, 64)  # lora_bias asks for a bias
    return peft.get_peft_model(model, getattr(peft, config)(r=2, target_modules=["lm_head"], **options)).train()


@pytest.mark.parametrize("kind", MORE)
def test_an_adapter_on_the_head_that_does_more_than_add_a_matrix_is_refused(kind: str) -> None:
    """Such a one gives the right log-probs until its first step: it starts from what changes nothing."""
    config, options = MORE[kind]
    with pytest.raises(UnsupportedError, match="the adapter 'default' on the head has"):
        logprobs_of(adapted(config, **options), IDS, IDS)
    off = adapted(config, **options)
    with off.disable_adapter():
        assert logprobs_of(off, IDS, IDS).shape == (2, 5)
    if "dropout" in kind:
        logprobs_of(off.eval(), IDS, IDS)


@pytest.mark.parametrize("config", ADDED)
def test_an_adapter_that_adds_a_matrix_to_the_head_trains_whole(config: str) -> None:
    """After a step, too, the log-probs and the gradient of each of its weights are those of the model's own logits."""
    model = adapted(config, **ADDED[config])
    trained = [p for p in model.parameters() if p.requires_grad]
    logprobs_of(model, IDS, IDS)  # compared at its start
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in trained:
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    ours, own = logprobs_of(model, IDS, IDS), logprobs_from_logits(model(input_ids=IDS).logits, IDS)
    assert (ours - own).abs().max() < 1e-4
    for a, b in zip(torch.autograd.grad(ours.sum(), trained), torch.autograd.grad(own.sum(), trained), strict=True):
        assert (a - b).norm() < 1e-4 * b.norm()
