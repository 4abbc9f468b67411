"""An adapter is on all linear layers of attention and feed-forward, whatever their names, and what it is not on is said."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft", reason="adapters are peft's (extra hf)")

import peft
import transformers
from pretrained.own_model import largest_error, sharing_prompt

from pullback.backends import AdamParams, TorchBackend
from pullback.backends.native import HFModel
from pullback.backends.native.models.layers import LLAMA, Coverage, coverage, layer_names
from pullback.backends.native.models.lora import LoraChoice, add_lora
from pullback.errors import ConfigError
from pullback.testing.models import zoo

DATA = sharing_prompt(6, (5, 3))
NAMES: dict[str, tuple[set[str], set[str]]] = {
    "gpt2": ({"attn.c_attn", "attn.c_proj"}, {"mlp.c_fc", "mlp.c_proj"}),
    "gpt_neox": ({"attention.query_key_value", "attention.dense"}, {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"}),
    "falcon": ({"self_attention.query_key_value", "self_attention.dense"}, {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"}),
    "bloom": ({"self_attention.query_key_value", "self_attention.dense"}, {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"}),
    "opt": ({f"self_attn.{n}" for n in ("q_proj", "k_proj", "v_proj", "out_proj")}, {"fc1", "fc2"}),
    "phi3": ({"self_attn.qkv_proj", "self_attn.o_proj"}, {"mlp.gate_up_proj", "mlp.down_proj"}),
}


@pytest.mark.parametrize("kind", NAMES)
def test_names_by_kind(kind: str) -> None:
    """Attention, feed-forward and head have their own names, and each is trained where it is chosen."""
    attention, mlp = NAMES[kind]
    names = layer_names(zoo.build(kind))
    assert (set(names.attention), set(names.mlp), names.unembed) == (attention, mlp, ("lm_head",))
    parts = {"train_attn": attention, "train_mlp": mlp, "train_unembed": {"lm_head"}}
    for part, layers in parts.items():
        choice = LoraChoice(2, **{name: name == part for name in parts})
        assert set(coverage(add_lora(zoo.build(kind), choice)).adapted) == layers
    assert set(coverage(add_lora(zoo.build(kind), 2)).adapted) == attention | mlp
    everything = LoraChoice(2, train_unembed=True)
    adapted: Any = add_lora(zoo.build(kind), everything)
    assert set(coverage(adapted).adapted) == attention | mlp | {"lm_head"}
    config = adapted.peft_config["default"]
    assert LoraChoice(2, train_mlp=False).as_saved(config, names) == everything
    only: Any = add_lora(zoo.build(kind), LoraChoice(2, train_attn=False))
    assert LoraChoice(2).as_saved(only.peft_config["default"], names) == LoraChoice(2, train_attn=False)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "falcon", "bloom", "phi3", "mixtral", "gemma2"])
def test_every_adapter_has_a_gradient(kind: str) -> None:
    """All that is adapted is trained; with Llama's names alone, most of these would have nothing but a head."""
    backend = TorchBackend(HFModel(add_lora(zoo.build(kind), LoraChoice(2, train_unembed=True))))
    backend.forward_backward(DATA, "cross_entropy").result()
    moved = {name for name, g in backend.gradients().items() if "lora_B" in name and float(g.norm()) > 0}
    assert moved == {name for name in backend.gradients() if "lora_B" in name}
    if kind in NAMES:  # negative control: the names of Llama's layers
        choice = LoraChoice(2, train_unembed=True)
        names = [name for part in LLAMA for name in part]
        assert len(coverage(add_lora(zoo.build(kind), choice, names)).adapted) < len(
            coverage(backend.model.model).adapted
        )


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")  # peft's, of fused experts
@pytest.mark.parametrize("kind", ["deepseek_v2", "glm4_moe", "qwen3_next", "dots1"])
def test_dense_layers_beside_experts(kind: str, tmp_path: Path) -> None:
    """They have adapters as the experts have, which train, and which peft saves and loads."""
    adapted = add_lora(zoo.build(kind), 2)
    assert [name for name, _ in coverage(adapted).left_out] == ["the output projection"]
    backend = TorchBackend(HFModel(adapted))
    backend.forward_backward(DATA, "cross_entropy").result()
    assert all(float(g.norm()) > 0 for name, g in backend.gradients().items() if "lora_B" in name and "_proj" in name)
    backend.optim_step(AdamParams(learning_rate=1e-2)).result()
    path = backend.export(tmp_path / "adapter", merged=False).result().path
    assert largest_error(backend, peft.PeftModel.from_pretrained(zoo.build(kind), path).eval(), DATA) < 5e-6
    again: Any = add_lora(zoo.build(kind), path)
    assert coverage(again).adapted == coverage(adapted).adapted
    choice = LoraChoice(2, train_attn=False).as_saved(again.peft_config["default"], layer_names(zoo.build(kind)))
    assert choice == LoraChoice(2)
    whole = backend.export(tmp_path / "whole").result().path
    assert largest_error(backend, transformers.AutoModelForCausalLM.from_pretrained(whole).eval(), DATA) < 5e-6
    config = peft.LoraConfig(r=2, target_modules="all-linear")  # negative control: peft's own choice
    left = [name for name, _ in coverage(peft.get_peft_model(zoo.build(kind), config)).left_out]
    assert [name for name in left if name.endswith("_proj")]


def test_llama_keeps_its_names() -> None:
    """Where no other layers are, the names are the usual ones, and peft's word stands for all of them."""
    assert layer_names(zoo.build("llama")) == LLAMA
    assert LoraChoice().layers(layer_names(zoo.build("qwen2"))) == "all-linear"
    with pytest.raises(ConfigError, match=r"does not fit LlamaForCausalLM: .*c_attn"):
        add_lora(zoo.build("llama"), {"r": 2, "target_modules": ["c_attn"]})
    with pytest.raises(ConfigError, match="trains nothing"):
        LoraChoice(train_attn=False, train_mlp=False).layers(LLAMA)


def test_a_part_that_sees_is_left_alone() -> None:
    """The layers of a vision tower, which no text runs through, have no adapter, though they have Llama's names."""
    model: Any = zoo.build("gemma3")
    backend = HFModel(add_lora(model, 2))
    adapted = [path for path, m in backend.model.named_modules() if hasattr(m, "get_base_layer")]
    assert adapted
    assert not [path for path in adapted if "vision" in path]
    found = coverage(backend.model)
    assert "a part that no text runs through" in dict(found.left_out)
    seeing = peft.get_peft_model(zoo.build("gemma3"), peft.LoraConfig(r=2, target_modules="all-linear"))
    assert [p for p, m in seeing.named_modules() if hasattr(m, "get_base_layer") and "vision" in p]  # negative control


def test_what_is_left_out_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """Fused experts, the head, and single layers; how much of the model is trained."""
    with caplog.at_level(logging.INFO, "pullback.backends.native.models.lora"):
        adapted = add_lora(zoo.build("gpt_oss"), 2)
    experts = sum(p.numel() for name, p in adapted.named_parameters() if "experts." in name and p.dim() == 3)
    found = coverage(adapted)
    assert dict(found.left_out) == {"the output projection": 64 * 32, "fused experts": experts}
    assert f"none on the output projection (2,048 weights), fused experts ({experts:,} weights)" in caplog.text
    assert "adapters on self_attn.k_proj" in caplog.text
    reached = coverage(add_lora(zoo.build("mixtral"), 2))  # whose experts peft knows
    assert dict(reached.left_out) == {"the output projection": 64 * 32}
    assert "mlp.experts" in reached.adapted
    some = coverage(add_lora(zoo.build("llama"), {"r": 2, "target_modules": ["q_proj"]}))
    assert {"self_attn.v_proj", "mlp.up_proj"} <= set(dict(some.left_out))
    full = coverage(zoo.build("llama"))
    assert (full.trained, full.adapted, full.left_out) == (full.total, (), ())
    assert str(Coverage(1, 4, (), ())) == "1 of 4 weights are trained (25.00%)"
