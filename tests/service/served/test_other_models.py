"""Models whose layers are not named as Llama's: at a service they train their own layers, and come back from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers and peft (extra hf)")

from pretrained.own_model import sharing_prompt

from pullback.backends import AdamParams
from pullback.backends.native import HFModel
from pullback.backends.native.models.lora import LoraChoice
from pullback.datums import ModelInput
from pullback.service import Base, ServedModels
from pullback.testing.models import zoo

DATA = sharing_prompt(6, (5, 3))
SDK = LoraChoice(2, train_unembed=True)  # what the official client asks for


def moved(models: ServedModels, model: str) -> set[str]:
    """The layers of a model whose adapter has moved."""
    causal: Any = models.backends[model].model
    named = [(path, m) for path, m in causal.model.named_modules() if hasattr(m, "lora_B")]
    return {path.rpartition(".")[2] for path, m in named if bool(m.lora_B["default"].weight.any())}


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        ("gpt2", {"c_attn", "c_proj", "c_fc"}),
        ("gpt_neox", {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
        ("falcon", {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
        ("bloom", {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
    ],
)
def test_their_own_layers_train(kind: str, layers: set[str], tmp_path: Path) -> None:
    """A step moves all of them; a sampler and a resumed model say what the trained one says."""
    models = ServedModels(Base(kind, zoo.build(kind)), tmp_path)
    models.create("s:train:0", SDK)
    backend = models.backends["s:train:0"]
    backend.forward_backward(DATA, "cross_entropy").result()
    backend.optim_step(AdamParams(learning_rate=1e-2)).result()
    assert moved(models, "s:train:0") == {*layers, "lm_head"}
    uri = models.save("s:train:0", "weights", "one", overwrite=False)
    models.create("s:train:1", LoraChoice(2))
    models.load("s:train:1", uri, optimizer=True)
    assert models.choices["s:train:1"] == SDK
    tokens = DATA[0].model_input.tokens
    expected = models.sampler("s:train:0").prompt_logprobs(ModelInput(tokens))
    again = models.sampler("s:train:1").prompt_logprobs(ModelInput(tokens))
    saved = models.saved_sampler(uri).prompt_logprobs(ModelInput(tokens))
    assert again[1:] == pytest.approx(expected[1:], abs=1e-5)
    assert saved[1:] == pytest.approx(expected[1:], abs=1e-5)
    fresh = models.base_sampler().prompt_logprobs(ModelInput(tokens))
    assert float((torch.tensor(fresh[1:]) - torch.tensor(expected[1:])).abs().max()) > 1e-2


def test_names_that_are_given_win(tmp_path: Path) -> None:
    """A base that says what attention is has it so."""
    models = ServedModels(Base("gpt2", zoo.build("gpt2"), attention=("c_attn",)), tmp_path)
    models.create("s:train:0", LoraChoice(2, train_mlp=False))
    backend = models.backends["s:train:0"]
    backend.forward_backward(DATA, "cross_entropy").result()
    backend.optim_step(AdamParams(learning_rate=1e-2)).result()
    assert moved(models, "s:train:0") == {"c_attn"}


def test_the_context_is_that_of_the_models_facts() -> None:
    """The service and its backends refuse beyond the same length: that to which a dynamic rotary embedding is scaled."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    base = Base("llama", zoo.build("llama", max_position_embeddings=64, rope_parameters=rope))
    assert base.context == HFModel(base.copy()).facts.max_length == 128
