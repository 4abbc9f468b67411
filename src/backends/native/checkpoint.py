"""Checkpoints: safetensors and a JSON manifest in one folder, written atomically, no pickle."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...errors import BackendError, CheckpointError
from ..types import SaveStateOutput
from .models.hf import HFModel
from .models.lora import checkpoint_alpha, set_alpha

if TYPE_CHECKING:
    from .engine import Engine

__all__ = ["load_checkpoint", "load_weights", "save_checkpoint"]

FORMAT: Final = 1
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_MANIFEST: Final = "manifest.json"
_WEIGHTS: Final = "weights.safetensors"
_ADAPTER: Final = "adapter_model.safetensors"


def save_checkpoint(
    engine: Engine, root: Path, name: str, overwrite: bool, *, everything: bool = True
) -> SaveStateOutput:
    """Write everything that the next step depends on, or the weights alone.

    Raises:
        CheckpointError: the name leaves the folder, or is taken.
    """
    if not _NAME.fullmatch(name):
        raise CheckpointError(f"checkpoint name {name!r} must be letters, digits, '.', '_' and '-' (no folders)")
    final = root / name
    if final.exists() and not overwrite:
        raise CheckpointError(f"checkpoint {final} exists; choose another name or pass overwrite=True")
    root.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=root))
    try:
        _write(engine, folder, everything)
        _replace(folder, final)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return SaveStateOutput(str(final))


def load_checkpoint(engine: Engine, folder: Path, *, everything: bool) -> None:
    """Load weights, or everything. All files are read and checked before anything changes.

    Raises:
        CheckpointError: missing, damaged, or of another model.
        BackendError: the window holds gradients of the present weights.
    """
    if engine.window.ledger.entries:
        raise BackendError(
            "the window holds gradients of the present weights; call optim_step or discard_gradients() before loading"
        )
    manifest = _manifest(folder)
    model: Any = engine.model
    lora = isinstance(model, HFModel) and model.is_lora
    weights = _read(folder, _weights_file(engine), manifest)
    alpha = checkpoint_alpha(model.model, folder) if lora else None
    current = _weights(engine)
    _require_same(folder, "weights", weights, current)
    if manifest["frozen"] != frozen_fingerprint(engine.module):
        raise CheckpointError(f"{folder} was trained on other frozen weights than this model has")
    kinds = ("optimizer", "window", "random") if everything else ()
    extras = {key: _read(folder, f"{key}.safetensors", manifest) for key in kinds}
    if everything:
        _require_known(folder, extras["window"], engine.parameters)
    with torch.no_grad():
        for name, tensor in weights.items():
            current[name].copy_(tensor)
    if alpha is not None:
        set_alpha(model.model, alpha)
    engine.window.clear()
    engine.optimizer.reset()
    engine.weights_version = int(manifest["weights_version"])
    if everything:
        engine.optimizer.restore(extras["optimizer"])
        engine.window.restore(manifest["window"], extras["window"])
        engine.operations = int(manifest["operations"])
        _restore_random(engine, extras["random"])


def frozen_fingerprint(module: nn.Module) -> str:
    """Return a digest of the frozen parameters: names, shapes, and a sample of each one's numbers."""
    digest = hashlib.sha256()
    for name, p in sorted(module.named_parameters()):
        if not p.requires_grad:
            sample = p.detach().reshape(-1)[:: max(1, p.numel() // 64)][:64].double().cpu()
            digest.update(f"{name}{tuple(p.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def load_weights(model: HFModel, folder: Path) -> None:
    """Load the weights of a checkpoint into a model of the same kind, for sampling.

    Raises:
        CheckpointError: missing, damaged, or of another model.
    """
    manifest = _manifest(folder)
    weights, current = _read(folder, _ADAPTER, manifest), model.adapter_weights()
    _require_same(folder, "weights", weights, current)
    with torch.no_grad():
        for name, tensor in weights.items():
            current[name].copy_(tensor)


def _write(engine: Engine, folder: Path, everything: bool) -> None:
    files = {_weights_file(engine): _weights(engine)}
    if everything:
        files |= {
            "optimizer.safetensors": engine.optimizer.to_tensors(),
            "window.safetensors": {n: p.grad for n, p in engine.parameters.items() if p.grad is not None},
            "random.safetensors": _random_tensors(engine),
        }
    for file, tensors in files.items():
        copied = {n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}
        save_file(copied, folder / file)
    if isinstance(engine.model, HFModel) and engine.model.is_lora:
        engine.model.write_adapter_config(folder)
    manifest = {
        "format": FORMAT,
        "weights_version": engine.weights_version,
        "operations": engine.operations,
        "window": engine.window.ledger.to_json(),
        "frozen": frozen_fingerprint(engine.module),
        "files": {file: _digest(folder / file) for file in files},
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in folder.iterdir():
        _sync(path)


def _replace(folder: Path, final: Path) -> None:
    """Move the finished folder into place; an old one is moved aside first, so a crash leaves one or the other."""
    old = final.with_name(f".{final.name}.old")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(final, old)
    os.rename(folder, final)
    shutil.rmtree(old, ignore_errors=True)
    _sync(final.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((folder / _MANIFEST).read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is no checkpoint: it has no {_MANIFEST}") from error
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{folder / _MANIFEST} is damaged: {error}") from error
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{folder} has format {manifest.get('format')!r}; this version reads {FORMAT}")
    return manifest


def _read(folder: Path, file: str, manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    expected = manifest["files"].get(file)
    if expected is None or not (folder / file).exists():
        raise CheckpointError(f"{folder} lacks {file}: it belongs to another kind of model, or is incomplete")
    if _digest(folder / file) != expected:
        raise CheckpointError(f"{folder / file} is damaged: its digest is not the one in {_MANIFEST}")
    return dict(load_file(folder / file))


def _require_same(folder: Path, what: str, saved: Mapping[str, Tensor], current: Mapping[str, Tensor]) -> None:
    differing = sorted(set(saved) ^ set(current)) or [
        f"{n} {tuple(saved[n].shape)} {saved[n].dtype}, here {tuple(current[n].shape)} {current[n].dtype}"
        for n in saved
        if saved[n].shape != current[n].shape or saved[n].dtype != current[n].dtype
    ]
    if differing:
        raise CheckpointError(f"the {what} of {folder} are not those of this model; they differ in: {differing[:5]}")


def _require_known(folder: Path, window: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    unknown = sorted(set(window) - set(parameters))
    if unknown:
        raise CheckpointError(
            f"the window of {folder} holds gradients of parameters that are not trained here: {unknown[:5]}"
        )


def _weights_file(engine: Engine) -> str:
    return _ADAPTER if isinstance(engine.model, HFModel) and engine.model.is_lora else _WEIGHTS


def _weights(engine: Engine) -> dict[str, Tensor]:
    """The live trained weights: in PEFT's naming for an adapter, else every parameter and buffer once."""
    if isinstance(engine.model, HFModel) and engine.model.is_lora:
        return engine.model.adapter_weights()
    module = engine.module
    persistent = set(module.state_dict())
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {name: t.detach() for name, t in tensors if name in persistent}


def _random_tensors(engine: Engine) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state(), "sampling": engine.generator.get_state()}
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return states | {f"cuda{i}": state for i, state in enumerate(cuda)}


def _restore_random(engine: Engine, saved: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(saved["cpu"])
    engine.generator.set_state(saved["sampling"])
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda{i}" in saved:
            torch.cuda.set_rng_state(saved[f"cuda{i}"], i)
