"""A model that is written out and loaded again by transformers, or by peft, is the model that was trained."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft", reason="adapters are peft's (extra hf)")

import peft
import transformers
from pretrained.folders import byte_tokenizer
from pretrained.own_model import largest_error, sharing_prompt
from tiers import sampled

from pullback.backends import AdamParams, TorchBackend
from pullback.backends.native import HFModel
from pullback.backends.native.checkpoints import export, files
from pullback.backends.native.models.lora import LoraChoice, add_lora
from pullback.errors import CheckpointError, ConfigError, UnsupportedError
from pullback.testing import TinyLM
from pullback.testing.models import zoo

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning")]  # peft's, of tied weights
DATA = sharing_prompt(6, (5, 3))
ADAPTERS: dict[str, tuple[str, bool, Any]] = {
    "full": ("llama", False, None),
    "full, tied": ("llama", True, None),
    "lora": ("llama", False, 4),
    "lora, tied": ("llama", True, 4),
    "lora on a tied head": ("llama", True, LoraChoice(4, train_unembed=True)),
    "lora of gpt2": ("gpt2", True, LoraChoice(4, train_unembed=True)),
    "lora of gemma2": ("gemma2", True, 4),
    "dora": ("llama", False, {"r": 4, "use_dora": True, "target_modules": ["q_proj"]}),
    "rslora": ("llama", False, {"r": 4, "use_rslora": True}),
    "biases": ("qwen2", False, {"r": 4, "bias": "all"}),
    "a copy of a tied head": ("llama", True, {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "tied rows": ("llama", True, {"r": 4, "target_modules": ["q_proj"], "trainable_token_indices": [5, 9]}),
}
FEW = ("full, tied", "lora", "lora of gemma2", "rslora", "tied rows")  # of the quick tier


def base(kind: str, tied: bool) -> Any:
    return zoo.build(kind, tie_word_embeddings=tied).double()  # so that 1e-6 says something


def trained(kind: str, tied: bool, lora: Any, **options: Any) -> TorchBackend:
    """A backend after a few steps, which moved it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = base(kind, tied) if lora is None else add_lora(base(kind, tied), lora)
    backend = TorchBackend(HFModel(model), **options)
    for _ in range(3):
        backend.forward_backward(DATA, "cross_entropy").result()
        backend.optim_step(AdamParams(learning_rate=1e-2)).result()
    assert largest_error(backend, base(kind, tied).eval(), DATA) > 0.1
    return backend


@pytest.mark.parametrize("name", sampled(ADAPTERS, FEW))
def test_the_whole_model(name: str, tmp_path: Path) -> None:
    """Weights with the adapter added: transformers loads them alone, and says what the backend says."""
    kind, tied, lora = ADAPTERS[name]
    backend = trained(kind, tied, lora)
    before = backend.model.state_dict()
    before = {key: p.clone() for key, p in before.items()}
    path = backend.export(tmp_path / "out").result().path
    loaded = transformers.AutoModelForCausalLM.from_pretrained(path)
    assert largest_error(backend, loaded.eval(), DATA) < 1e-6
    assert loaded.config._attn_implementation == "sdpa" or kind == "gemma2"
    after = backend.model.state_dict()
    assert all(torch.equal(p, after[key]) for key, p in before.items())
    again = TorchBackend.from_pretrained(path, device="cpu")
    assert largest_error(again, loaded.float(), DATA) < 1e-5


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")  # peft's, of fused experts
@pytest.mark.parametrize(
    ("kind", "lora"), [("llama", {"r": 4, "init_lora_weights": "pissa"}), ("qwen3_moe", 4)], ids=["pissa", "experts"]
)
def test_what_is_made_in_fp32_only(kind: str, lora: Any, tmp_path: Path) -> None:
    """PiSSA, which changed the base and does so again where its adapter is loaded; and adapters on fused experts."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = add_lora(zoo.build(kind), lora)
    backend = TorchBackend(HFModel(model))
    backend.forward_backward(DATA, "cross_entropy").result()
    backend.optim_step(AdamParams(learning_rate=1e-2)).result()
    assert largest_error(backend, zoo.build(kind).eval(), DATA) > 0.1
    path = backend.export(tmp_path / "out").result().path
    assert largest_error(backend, transformers.AutoModelForCausalLM.from_pretrained(path).eval(), DATA) < 5e-6
    path = backend.export(tmp_path / "adapter", merged=False).result().path
    assert largest_error(backend, peft.PeftModel.from_pretrained(zoo.build(kind), path).eval(), DATA) < 5e-6


def half(lora: Any) -> tuple[TorchBackend, dict[str, torch.Tensor]]:
    """A backend on a base in bfloat16 after a few steps, and what base and adapter come to, layer by layer, in fp64."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = zoo.build("llama")
        for p in model.parameters():
            p.data = p.data.bfloat16()  # but not the buffers, whose frequencies stay in fp32
        model = add_lora(model, lora)
    backend = TorchBackend(HFModel(model))
    for _ in range(3):
        backend.forward_backward(DATA, "cross_entropy").result()
        backend.optim_step(AdamParams(learning_rate=1e-2)).result()
    exact = {}
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
            exact[f"{name}.weight"] = layer.get_base_layer().weight.double() + layer.scaling["default"] * b @ a
    return backend, {name: p.detach() for name, p in exact.items()}


def test_a_half_base_is_rounded_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each weight is the exact sum, rounded to bfloat16: within 2^-8 of it. The log says how much of the change that is."""
    backend, exact = half(4)
    base = zoo.build("llama").bfloat16().state_dict()
    with caplog.at_level(logging.WARNING):
        path = backend.export(tmp_path / "out").result().path
    loaded = transformers.AutoModelForCausalLM.from_pretrained(path).state_dict()
    assert exact
    lost, change = 0.0, 0.0
    for name, expected in exact.items():
        found = loaded[name]
        assert found.dtype == torch.bfloat16
        assert bool(((found.double() - expected).abs() <= expected.abs() * 2**-8).all())
        assert (
            float((found == expected.bfloat16()).double().mean()) > 0.999
        )  # but where a sum in fp32 falls on another side
        lost += float((found.double() - expected).square().sum())
        change += float((expected - base[name].double()).square().sum())
    share = (lost / change) ** 0.5
    assert 0 < share < 1
    assert f"rounded to bfloat16: the error is {share:.2g} of the adapter's change" in caplog.text


@pytest.mark.parametrize("dtype", ["float32", torch.float32])
def test_a_half_base_is_written_in_fp32(dtype: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With dtype nothing is lost: the model with its adapter, computed in fp32, is what is loaded."""
    backend, exact = half(4)
    with caplog.at_level(logging.WARNING):
        path = backend.export(tmp_path / "out", dtype=dtype).result().path
    assert "rounded" not in caplog.text
    assert json.loads((Path(path) / "config.json").read_text())["dtype"] == "float32"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert all(torch.allclose(loaded.state_dict()[n].double(), p, rtol=1e-6, atol=1e-8) for n, p in exact.items())
    again = TorchBackend.from_pretrained(path, device="cpu")
    assert largest_error(again, backend.model.model.float().eval(), DATA) < 1e-5  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="an adapter alone is written as it is"):
        backend.export(tmp_path / "adapter", merged=False, dtype=dtype).result()
    with pytest.raises(ConfigError, match="floating-point"):
        backend.export(tmp_path / "adapter", dtype="int8").result()


def test_fp32_says_nothing_of_rounding(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An fp32 base is written as it is computed; asked for in bfloat16, it is rounded, and that is said."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backend = TorchBackend(HFModel(add_lora(zoo.build("llama"), 4)))
    backend.forward_backward(DATA, "cross_entropy").result()
    backend.optim_step(AdamParams(learning_rate=1e-2)).result()
    with caplog.at_level(logging.WARNING):
        path = backend.export(tmp_path / "out").result().path
    assert "rounded" not in caplog.text
    assert largest_error(backend, transformers.AutoModelForCausalLM.from_pretrained(path).eval(), DATA) < 5e-6
    with caplog.at_level(logging.WARNING):
        path = backend.export(tmp_path / "half", dtype="bfloat16").result().path
    assert "rounded to bfloat16" in caplog.text
    loaded = transformers.AutoModelForCausalLM.from_pretrained(path)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


def test_a_head_that_stayed_tied_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: an adapter that is added to a head whose weights the embedding shares makes another model."""
    monkeypatch.setattr(export, "_untie", lambda model: None)
    kind, tied, lora = ADAPTERS["lora on a tied head"]
    backend = trained(kind, tied, lora)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(backend.export(tmp_path / "out").result().path)
    assert largest_error(backend, loaded.eval(), DATA) > 1e-2


@pytest.mark.parametrize("name", sampled([n for n, (_, _, lora) in ADAPTERS.items() if lora is not None], FEW))
def test_the_adapter_alone(name: str, tmp_path: Path) -> None:
    """peft loads it onto the base; so does a backend, which trains on."""
    kind, tied, lora = ADAPTERS[name]
    backend = trained(kind, tied, lora)
    path = backend.export(tmp_path / "adapter", merged=False).result().path
    loaded = peft.PeftModel.from_pretrained(base(kind, tied), path)
    assert largest_error(backend, loaded.eval(), DATA) < 1e-6
    base(kind, tied).save_pretrained(tmp_path / "base")
    again = TorchBackend.from_pretrained(path, base=tmp_path / "base", dtype="float64", device="cpu")
    assert largest_error(again, loaded, DATA) < 1e-6


def test_tokenizer_and_what_is_there(tmp_path: Path) -> None:
    """The tokenizer goes along; what is there is replaced if asked for, at once; what cannot be written is refused."""
    folder = tmp_path / "out"
    backend = trained("llama", False, 4, tokenizer=byte_tokenizer())
    backend.export(folder).result()
    assert TorchBackend.from_pretrained(folder, device="cpu").tokenizer.encode("a") == backend.tokenizer.encode("a")
    with pytest.raises(CheckpointError, match="overwrite=True"):
        backend.export(folder).result()
    backend.export(folder, merged=False, overwrite=True).result()
    assert (folder / "adapter_config.json").exists()
    assert not (folder / "config.json").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(UnsupportedError, match="save_weights"):
        TorchBackend(TinyLM()).export(tmp_path / "own").result()
    for name, p in backend.model.named_parameters():
        p.requires_grad_(p.requires_grad or "norm" in name)
    with pytest.raises(UnsupportedError, match="merged=True"):
        backend.export(tmp_path / "more", merged=False).result()


def test_a_crash_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An export that dies half-way leaves the earlier one, and no debris."""
    backend = trained("llama", False, 4)
    backend.export(tmp_path / "out").result()
    before = json.loads((tmp_path / "out" / "config.json").read_text())
    monkeypatch.setattr(files, "_sync", lambda path: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        backend.export(tmp_path / "out", overwrite=True).result()
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
