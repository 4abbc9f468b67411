"""What is trained is what is saved: a checkpoint of an adapter is the same function when it is loaded, or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft", reason="adapters are peft's (extra hf)")

import peft
from pretrained.own_model import sharing_prompt

from pullback.backends import AdamParams, TorchBackend
from pullback.backends.native import HFModel
from pullback.backends.native.checkpoints import checkpoint
from pullback.backends.native.checkpoints.files import read_manifest
from pullback.backends.native.models import adapters
from pullback.errors import CheckpointError, UnsupportedError
from pullback.testing.models import zoo

DATA = sharing_prompt(6, (5, 3))
Q_V = ["q_proj", "v_proj"]


def made(folder: Path, what: str = "", *, name: str = "default", **changes: Any) -> TorchBackend:
    """A backend on a tiny Qwen2 with LoRA, and with what else is trained beside it."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": Q_V, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = peft.get_peft_model(zoo.build("qwen2"), config, adapter_name=name)
    for parameter, p in model.named_parameters():
        p.requires_grad_(p.requires_grad or (bool(what) and what in parameter))
    return TorchBackend(HFModel(model), checkpoint_dir=folder)


def trained(backend: TorchBackend, steps: int = 3) -> TorchBackend:
    for _ in range(steps):
        backend.forward_backward(DATA, "cross_entropy").result()
        backend.optim_step(AdamParams(learning_rate=1e-2)).result()
    return backend


def gap(a: TorchBackend, b: TorchBackend) -> float:
    """Largest difference of a log-prob, nats."""
    x, y = (torch.cat([o["logprobs"].to_torch() for o in one.forward(DATA).result().loss_fn_outputs]) for one in (a, b))
    return float((x - y).abs().max())


OTHERS: list[dict[str, Any]] = [
    {"lora_alpha": 32},
    {"use_rslora": True},
    {"alpha_pattern": {"q_proj": 64}},
    {"init_lora_weights": "olora"},
]


@pytest.mark.parametrize("changes", OTHERS, ids=lambda changes: "-".join(changes))
def test_another_function_of_the_weights_is_refused(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that fit a model whose adapter is scaled or started otherwise are refused, and nothing changes."""
    saved = trained(made(tmp_path))
    path = saved.save_state("s").result().path
    same, other, first = made(tmp_path), made(tmp_path, **changes), made(tmp_path, **changes)
    same.load_state_with_optimizer(path).result()
    assert gap(saved, same) < 1e-6
    with pytest.raises(CheckpointError, match="lora=<that folder>"):
        other.load_state_with_optimizer(path).result()
    assert gap(other, first) == 0.0
    with pytest.raises(CheckpointError, match="lora=<that folder>"):
        checkpoint.load_weights(other.model, Path(path))  # type: ignore[arg-type]
    # negative control: unchecked, all of these load (but a changed base), and mean something else
    monkeypatch.setattr(checkpoint, "checkpoint_alpha", lambda model, folder: None)
    monkeypatch.setattr(checkpoint, "frozen_fingerprint", lambda module: read_manifest(Path(path))["frozen"])
    other.load_state(path).result()
    assert gap(saved, other) > 1e-2


BESIDE: dict[str, dict[str, Any]] = {
    "embed_tokens": {"what": "embed_tokens"},
    "norms": {"what": "norm"},
    "bias": {"bias": "all"},
    "one bias": {"what": "q_proj.base_layer.bias"},
    "saved module": {"modules_to_save": ["norm"]},
    "saved head": {"modules_to_save": ["lm_head"]},
    "new tokens": {"trainable_token_indices": [5, 9]},
}


@pytest.mark.parametrize("options", BESIDE.values(), ids=BESIDE.keys())
def test_what_is_trained_beside_the_adapter_comes_back(options: dict[str, Any], tmp_path: Path) -> None:
    """Embeddings, norms, biases and whole modules are in the checkpoint, weights alone or everything."""
    saved = trained(made(tmp_path, **options))
    for save, load in (("save_state", "load_state_with_optimizer"), ("save_weights", "load_state")):
        path = getattr(saved, save)(save).result().path
        resumed = made(tmp_path, **options)
        assert gap(saved, resumed) > 1e-2
        getattr(resumed, load)(path).result()
        assert gap(saved, resumed) < 1e-6
    resumed.load_state_with_optimizer(tmp_path / "save_state").result()
    assert gap(trained(saved, 1), trained(resumed, 1)) < 1e-6


def test_weights_beside_the_adapter_must_be_trained_here_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint with more, or less, than the model trains is refused; without the file of these weights they are lost."""
    embedding = trained(made(tmp_path, "embed_tokens"))
    path = embedding.save_state("more").result().path
    less = trained(made(tmp_path)).save_state("less").result().path
    with pytest.raises(CheckpointError, match="beside the adapter that are not trained here"):
        made(tmp_path).load_state(path).result()
    with pytest.raises(CheckpointError, match="lacks trained_beside_adapter"):
        made(tmp_path, "embed_tokens").load_state(less).result()
    monkeypatch.setattr(HFModel, "trained_outside", lambda model: {})  # negative control
    path = embedding.save_state("lost").result().path
    resumed = made(tmp_path, "embed_tokens")
    resumed.load_state(path).result()
    assert gap(embedding, resumed) > 1e-2


def test_an_adapter_of_another_name(tmp_path: Path) -> None:
    """The adapter that is on is saved and loaded, whatever its name; several at once are refused."""
    saved = trained(made(tmp_path, name="policy"))
    path = saved.save_state("s").result().path
    for name in ("policy", "default"):
        resumed = made(tmp_path, name=name)
        resumed.load_state(path).result()
        assert gap(saved, resumed) < 1e-6
    with pytest.raises(CheckpointError, match="moments of parameters that are not trained here"):
        resumed.load_state_with_optimizer(path).result()
    model: Any = saved.model
    model.model.add_adapter("second", peft.LoraConfig(r=2, target_modules=Q_V))
    assert adapters.active_adapter(model.model) == "policy"
    model.model.base_model.set_adapter(["policy", "second"])
    with pytest.raises(UnsupportedError, match="one adapter"):
        saved.save_state("several").result()


def test_loading_makes_autocast_forget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights loaded under autocast count at once, though their casts were made before."""
    saved = trained(made(tmp_path))
    path = saved.save_state("s").result().path

    def drift() -> float:
        fresh = made(tmp_path)
        with torch.autocast("cpu", torch.bfloat16):
            fresh.forward_backward(DATA, "cross_entropy").result()
            fresh.discard_gradients()
            checkpoint.load_weights(fresh.model, Path(path))  # type: ignore[arg-type]
            return gap(saved, fresh)

    assert drift() == 0.0
    monkeypatch.setattr(checkpoint, "forget_casts", lambda: None)
    assert drift() > 0.0  # negative control
