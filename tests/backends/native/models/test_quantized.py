"""A model with quantised weights trains an adapter as itself, or is refused with what to do instead."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft", reason="adapters are peft's (extra hf)")

import transformers
from pretrained.own_model import largest_error, sharing_prompt
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from pullback.backends import TorchBackend
from pullback.backends.native import HFModel
from pullback.backends.native.execution.memory import GraphMeter
from pullback.backends.native.models.dense_layers import keep_dense_layers
from pullback.backends.native.models.facts.quantized import plain_tensors, require_adapter, weight_count
from pullback.backends.native.models.layers import coverage
from pullback.backends.native.models.lora import LoraChoice, add_lora
from pullback.errors import UnsupportedError
from pullback.testing import check_model
from pullback.testing.models import zoo

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
DATA = sharing_prompt(6, (5, 3))


class EightBit(nn.Linear):
    """A linear layer of whole numbers and a scale, as libraries of quantisation have them."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False)
        weight = plain.weight.detach()
        self.scale = float(weight.abs().max()) / 127
        self.weight = nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.to(x.dtype) * self.scale).T


def quantized(head: bool = False) -> Any:
    """A small Llama whose layers, and head, are of eight bits."""
    model: Any = zoo.build("llama", **SIZES)
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, one in list(part.named_children()):
                if isinstance(one, nn.Linear):
                    setattr(part, name, EightBit(one))
    if head:
        model.lm_head = EightBit(model.lm_head)
    model.is_quantized = True
    return model


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_on_codes_trains_as_itself() -> None:
    """Log-probs, gradients, reference, checkpoints: all rows are right, but for full gradients, which there are none of."""
    rows = {row.name: row for row in check_model(quantized, lora=4)}
    assert {row.verdict for row in rows.values()} == {"right", "not applicable"}
    assert rows["gradient, full"].verdict == "not applicable"
    assert rows["gradient, LoRA"].verdict == "right"
    plain = {row.name: row.verdict for row in check_model(lambda: zoo.build("llama", **SIZES), lora=4)}
    assert plain["gradient, full"] == "right"  # negative control


def test_what_happens_to_be_left_is_not_trained() -> None:
    """Without an adapter only embeddings, norms and the head would be; who chooses them may."""
    with pytest.raises(UnsupportedError, match="quantized and cannot be trained themselves: pass lora="):
        require_adapter(quantized())
    model = quantized()
    model.model.embed_tokens.weight.requires_grad_(False)
    require_adapter(model)
    require_adapter(zoo.build("llama"))
    rows = check_model(quantized, lora={"r": 4, "target_modules": ["lm_head"]})
    assert rows[0].verdict == "right"


def test_a_quantized_head_is_refused() -> None:
    """Log-probs are computed from its weights."""
    with pytest.raises(
        UnsupportedError, match=r"the head of LlamaForCausalLM is quantized \(Parameter\).*all but the head"
    ):
        HFModel(quantized(head=True))
    with pytest.raises(UnsupportedError, match="is quantized"):
        HFModel(add_lora(quantized(head=True), LoraChoice(4, train_unembed=True)))
    HFModel(quantized())  # negative control


def test_activations_that_are_quantized_are_refused() -> None:
    """LLM.int8() lets tokens see each other; rounded activations let batches see each other."""
    model = add_lora(quantized(), 4)
    settings = transformers.BitsAndBytesConfig(load_in_8bit=True)
    model.get_base_model().config.quantization_config = settings  # type: ignore[operator]  # peft's
    with pytest.raises(UnsupportedError, match=r"llm_int8_threshold=6 .* quantize with llm_int8_threshold=0\.0"):
        HFModel(model)
    settings.llm_int8_threshold = 0.0
    HFModel(model)
    next(p for p in model.parameters() if not p.is_floating_point()).act_quant_kwargs = "by rows"  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedError, match=r"activations are quantized before .*q_proj.*weights alone"):
        HFModel(model)


def test_a_merge_is_refused(tmp_path: Path) -> None:
    """The sum would have to be quantised anew; the adapter alone is written."""
    backend = TorchBackend(HFModel(add_lora(quantized(), 4)))
    with pytest.raises(UnsupportedError, match="pass merged=False"):
        backend.export(tmp_path / "whole").result()
    assert (Path(backend.export(tmp_path / "own", merged=False).result().path) / "adapter_config.json").exists()


def test_tensors_that_are_made_of_others() -> None:
    """What counts is what lies in memory; one of four bits stands for two weights in a byte."""
    inner = TwoTensor(torch.ones(2), torch.zeros(2))
    outer = TwoTensor(inner, TwoTensor(torch.full((2,), 2.0), torch.full((2,), 3.0)))
    assert [t.tolist() for t in plain_tensors(outer)] == [[1, 1], [0, 0], [2, 2], [3, 3]]
    assert list(plain_tensors(inner.a)) == [inner.a]
    module = nn.Module()
    module.weight = nn.Parameter(inner)
    assert {t.untyped_storage().data_ptr() for t in (inner.a, inner.b)} <= GraphMeter.of(module).owned
    codes = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    assert weight_count(codes) == 8
    codes.quant_state = type("State", (), {"shape": torch.Size((4, 4))})()  # type: ignore[attr-defined]
    assert weight_count(codes) == 16


def test_dense_layers_of_codes_are_not_named_by_their_weights() -> None:
    """peft adds a matrix to a weight that is named so, which codes do not bear."""
    plain: Any = add_lora(zoo.build("deepseek_v2"), 2)
    assert "shared_experts.up_proj.weight" in plain.peft_config["default"].target_parameters
    model = zoo.build("deepseek_v2")
    model.is_quantized = True
    adapted: Any = add_lora(model, 2)
    config = adapted.peft_config["default"]
    assert not any("shared" in name for name in config.target_parameters)
    assert keep_dense_layers(config, zoo.build("llama")) is config


LIBRARIES: dict[str, tuple[str, dict[str, Any]]] = {
    "int8 weights": ("torchao", {}),
    "nf4": ("bitsandbytes", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "int8 without outliers": ("bitsandbytes", {"load_in_8bit": True, "llm_int8_threshold": 0.0}),
    "int8": ("bitsandbytes", {"load_in_8bit": True}),
    "int8 activations": ("torchao", {"activations": True}),
    "head, torchao": ("torchao", {"modules_to_not_convert": ["none"]}),
    "head, nf4": ("bitsandbytes", {"load_in_4bit": True, "llm_int8_skip_modules": ["none"]}),
}
RIGHT = ("int8 weights", "nf4", "int8 without outliers")
REFUSED = {
    "int8": r"llm_int8_threshold=0\.0",
    "int8 activations": "quantize weights alone",
    "head, torchao": "all but the head",
    "head, nf4": "all but the head",
}


def saved(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A folder with a small Llama that a library has quantised; skips where the library is not installed."""
    library, options = LIBRARIES[name]
    pytest.importorskip(library, reason=f"{library} is not installed")
    zoo.build("llama", **SIZES).save_pretrained(folder / "plain")
    settings: Any
    if library == "bitsandbytes":
        settings = transformers.BitsAndBytesConfig(**options, bnb_4bit_compute_dtype=dtype)
    else:
        ways = importlib.import_module("torchao.quantization")
        kind = "Int8DynamicActivationInt8WeightConfig" if options.get("activations") else "Int8WeightOnlyConfig"
        others = {key: value for key, value in options.items() if key != "activations"}
        settings = transformers.TorchAoConfig(getattr(ways, kind)(), **others)
    load = transformers.AutoModelForCausalLM.from_pretrained
    load(folder / "plain", quantization_config=settings, dtype=dtype).save_pretrained(folder / "quantized")
    return folder / "quantized"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", RIGHT)
def test_libraries(name: str, tmp_path: Path) -> None:
    """Every row of the table is right, in fp32 and in bfloat16; without an adapter the model is refused."""
    folder = saved(name, tmp_path)
    rows = check_model(folder, lora=4, dtype="bfloat16", device="cpu")
    assert {row.verdict for row in rows} == {"right", "not applicable"}, rows
    with pytest.raises(UnsupportedError, match="pass lora="):
        TorchBackend.from_pretrained(folder, device="cpu")
    backend = TorchBackend.from_pretrained(folder, lora=4, device="cpu")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    assert 1e-3 < largest_error(backend, plain, DATA) < 1  # negative control: it is quantised
    found, whole = coverage(backend.model.model), sum(p.numel() for p in plain.parameters())
    assert found.total - found.trained == whole


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_libraries_refused(name: str, tmp_path: Path) -> None:
    """What cannot be right does not load, and says what to do."""
    with pytest.raises(UnsupportedError, match=REFUSED[name]):
        TorchBackend.from_pretrained(saved(name, tmp_path), lora=4, device="cpu")
