"""What from_pretrained loads is what the folder says, an adapter too; all else is refused in one sentence of ours."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft", reason="adapters are peft's (extra hf)")

import huggingface_hub
import peft
import transformers
from pretrained.own_model import largest_error, sharing_prompt

from pullback.backends import AdamParams, TorchBackend
from pullback.backends.native.models import gguf, load, tokenizers
from pullback.errors import BackendError, CheckpointError, ConfigError, PullbackError, UnsupportedError
from pullback.testing.models import zoo

DATA = sharing_prompt(6, (5, 3))
SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    zoo.build("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapter(base: Path, folder: Path, **changes: Any) -> Any:
    """Write an adapter that is not at its start; return the model with it."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    settings: dict[str, Any] = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**{**settings, "init_lora_weights": False, **changes}))
    adapted.save_pretrained(folder)
    return adapted.eval()


def test_an_adapter_is_loaded_on_its_base(base: Path, tmp_path: Path) -> None:
    """It is on the base that its config names, or on the one that is given; it is what trains; it is not the base."""
    model = adapter(base, tmp_path / "adapter")
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=str(base)):
        TorchBackend.from_pretrained(tmp_path / "adapter", device="cpu")
    backend = TorchBackend.from_pretrained(tmp_path / "adapter", base=moved, device="cpu")
    moved.rename(base)
    for loaded in (backend, TorchBackend.from_pretrained(tmp_path / "adapter", device="cpu")):
        assert largest_error(loaded, model, DATA) < 1e-5
        assert loaded.tokenizer is None
        assert {n.split(".")[-3] for n, p in loaded.model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    assert largest_error(backend, plain.eval(), DATA) > 1e-2  # negative control: the adapter counts
    backend.forward_backward(DATA, "cross_entropy").result()
    assert backend.optim_step(AdamParams(learning_rate=1e-2)).result().metrics["grad_norm"] > 0


@pytest.mark.parametrize("lora", [8, {"r": 8}, peft.LoraConfig(r=8)], ids=["rank", "dict", "config"])
def test_another_adapter_beside_a_saved_one_is_refused(lora: Any, base: Path, tmp_path: Path) -> None:
    """A saved adapter is never discarded for a fresh one."""
    adapter(base, tmp_path / "adapter")
    with pytest.raises(ConfigError, match="would be another one"):
        TorchBackend.from_pretrained(tmp_path / "adapter", lora=lora, device="cpu")
    with pytest.raises(ConfigError, match="base= names the base of an adapter"):
        TorchBackend.from_pretrained(base, base=base, device="cpu")


def test_dropout_of_a_saved_adapter(base: Path, tmp_path: Path) -> None:
    """It is refused, and can be given up by name."""
    model = adapter(base, tmp_path / "adapter", lora_dropout=0.1)
    with pytest.raises(UnsupportedError, match="lora_dropout=0"):
        TorchBackend.from_pretrained(tmp_path / "adapter", device="cpu")
    backend = TorchBackend.from_pretrained(tmp_path / "adapter", lora={"lora_dropout": 0.0}, device="cpu")
    assert largest_error(backend, model, DATA) < 1e-5


def test_an_adapter_of_another_model_is_refused(base: Path, tmp_path: Path) -> None:
    """Weights that have no place, or are missing, are not passed over."""
    adapter(base, tmp_path / "adapter")
    zoo.build("llama", hidden_size=64).save_pretrained(tmp_path / "wide")
    with pytest.raises(CheckpointError, match="is not one of LlamaForCausalLM"):
        TorchBackend.from_pretrained(tmp_path / "adapter", base=tmp_path / "wide", device="cpu")
    zoo.build("llama", num_hidden_layers=3).save_pretrained(tmp_path / "deep")
    with pytest.raises(CheckpointError, match="missing adapter keys"):
        TorchBackend.from_pretrained(tmp_path / "adapter", base=tmp_path / "deep", device="cpu")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": None}))
    with pytest.raises(ConfigError, match="pass base="):
        TorchBackend.from_pretrained(tmp_path / "adapter", device="cpu")


def test_a_checkpoint_is_an_adapter_too(base: Path, tmp_path: Path) -> None:
    """The folder of save_state is loaded on its base; with weights beside the adapter it is refused."""
    backend = TorchBackend.from_pretrained(base, lora=4, device="cpu", checkpoint_dir=tmp_path)
    backend.forward_backward(DATA, "cross_entropy").result()
    backend.optim_step(AdamParams(learning_rate=1e-2)).result()
    path = backend.save_state("s").result().path
    model: Any = backend.model
    again = TorchBackend.from_pretrained(path, device="cpu")
    assert largest_error(again, model.model, DATA) < 1e-5
    for name, p in backend.model.named_parameters():
        p.requires_grad_(p.requires_grad or "norm" in name)
    path = backend.save_weights("more").result().path
    with pytest.raises(CheckpointError, match="beside the adapter"):
        TorchBackend.from_pretrained(path, device="cpu")


@pytest.mark.parametrize("lora", [{"r": 4}, {"r": 4, "use_rslora": True}, {"r": 2, "target_modules": ["q_proj"]}])
def test_a_dict_of_settings(lora: dict[str, Any], base: Path) -> None:
    """Fields of peft.LoraConfig; what is left out is as with a rank alone; a field that is not one is refused."""
    model: Any = TorchBackend.from_pretrained(base, lora=lora, device="cpu").model
    rank: Any = TorchBackend.from_pretrained(base, lora=4, device="cpu").model
    config, usual = (m.model.peft_config["default"].to_dict() for m in (model, rank))
    assert {k: config[k] for k in lora if k != "target_modules"} == {
        k: v for k, v in lora.items() if k != "target_modules"
    }
    assert {k for k in config if config[k] != usual[k]} <= set(lora)
    with pytest.raises(ConfigError, match="ranke"):
        TorchBackend.from_pretrained(base, lora={"ranke": 4}, device="cpu")


def t5(folder: Path) -> None:
    config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)


def bert(folder: Path) -> None:
    transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, num_attention_heads=4)).save_pretrained(folder)


def xlnet(folder: Path) -> None:
    config = transformers.XLNetConfig(vocab_size=64, d_model=32, n_layer=1, n_head=4, d_inner=32)
    transformers.XLNetLMHeadModel(config).save_pretrained(folder)


def vit(folder: Path) -> None:
    config = transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32)
    transformers.ViTModel(config).save_pretrained(folder)


def headless(folder: Path) -> None:
    zoo.build("llama").model.save_pretrained(folder)


def config_only(folder: Path) -> None:
    zoo.tiny_config("llama").save_pretrained(folder)


def unknown(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "blorb"}')


REFUSED: list[tuple[Callable[[Path], None], type[PullbackError], str]] = [
    (t5, UnsupportedError, "is a T5 model, and transformers has no causal language model of that kind"),
    (vit, UnsupportedError, "is a ViT model, and transformers has no causal"),
    (bert, UnsupportedError, "BertLMHeadModel does not compute its logits"),
    (xlnet, BackendError, "the model is not causal"),
    (headless, CheckpointError, "lacks weights of LlamaForCausalLM, which would be random.*lm_head"),
    (config_only, CheckpointError, "holds no model that transformers can load"),
    (unknown, UnsupportedError, "cannot be loaded by transformers as a causal language model: .*blorb"),
    (lambda folder: None, UnsupportedError, "cannot be loaded by transformers"),
    (lambda folder: folder.rmdir(), CheckpointError, r"there is no folder /.*it$"),
]


@pytest.mark.parametrize(("write", "error", "words"), REFUSED, ids=[w.__name__.strip("<>") for w, *_ in REFUSED])
def test_what_is_no_causal_model_is_refused(
    write: Callable[[Path], None], error: type[PullbackError], words: str, tmp_path: Path
) -> None:
    """Encoders, other senses, missing weights and unknown kinds: one sentence each."""
    folder = tmp_path / "it"
    folder.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write(folder)
        with pytest.raises(error, match=words) as caught:
            TorchBackend.from_pretrained(folder, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nofolder", "no/folder"])
def test_a_name_that_is_no_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be one of the hub's; without a connection it is said that there is no such folder, and which names are known."""

    def unreachable(*given: Any, **options: Any) -> Any:
        raise OSError("We couldn't connect to the hub")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load, "_is_adapter", lambda path: False)
    monkeypatch.setattr(load, "_cached_names", lambda: ["me/known"])
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", unreachable)
    words = f"there is no folder {name}, and no model of that name .* holds me/known: We couldn't connect"
    with pytest.raises(CheckpointError, match=words):
        TorchBackend.from_pretrained(name, device="cpu")
    (tmp_path / name).mkdir(parents=True)
    with pytest.raises(CheckpointError, match=f"^{name} holds no model that transformers can load"):
        TorchBackend.from_pretrained(name, device="cpu")  # negative control: it is a folder


def test_names_in_the_cache_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of models, and none where there is no cache."""
    scan = huggingface_hub.scan_cache_dir
    for cache in ("none", "hub"):
        monkeypatch.setattr(huggingface_hub, "scan_cache_dir", partial(scan, tmp_path / cache))
        if cache == "hub":
            commit = "0" * 40
            for folder in ("models--me--known", "datasets--me--data"):
                snapshot = tmp_path / cache / folder / "snapshots" / commit
                snapshot.mkdir(parents=True)
                (snapshot / "config.json").write_text("{}")
        assert load._cached_names() == (["me/known"] if cache == "hub" else [])


def test_quantized_weights_are_not_trained_in_part(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an adapter only what is not quantized would train; that is refused."""
    plain = load._load

    def quantized(*given: Any) -> Any:
        model = plain(*given)
        model.is_quantized = True
        return model

    monkeypatch.setattr(load, "_load", quantized)
    with pytest.raises(UnsupportedError, match="quantized"):
        TorchBackend.from_pretrained(base, device="cpu")
    TorchBackend.from_pretrained(base, lora=4, device="cpu")


@pytest.mark.parametrize("error", [OSError, ImportError, TypeError, AttributeError, RuntimeError])
def test_a_tokenizer_that_cannot_be_loaded_is_none(
    error: type[Exception], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However its loading fails; a GGUF file without one is converted too."""

    def fail(*given: Any, **options: Any) -> Any:
        raise error("no tokenizer")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    assert tokenizers.load_tokenizer(base) is None
    assert TorchBackend.from_pretrained(base, device="cpu").tokenizer is None
    real = transformers.AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda folder, gguf_file, dtype: real(base, dtype=dtype)
    )
    (tmp_path / "out").mkdir()
    gguf._convert(base, "model.gguf", tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()
