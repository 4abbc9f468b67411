"""Checkpoints: safetensors and a JSON manifest in one folder, written atomically, no pickle."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Protocol, TypeGuard

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...errors import CheckpointError
from ..normalization import Ledger
from .accumulator import Accumulator
from .models.facts.quantized import plain_tensors
from .models.hf import HFModel
from .models.lora import checkpoint_alpha, set_alpha
from .optimizer import Optimizer, forget_casts

__all__ = ["ADAPTER", "load_checkpoint", "load_weights", "save_checkpoint", "unfinished", "write_tensors"]

FORMAT: Final = 1
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_MANIFEST: Final = "manifest.json"
_WEIGHTS: Final = "weights.safetensors"
ADAPTER: Final = "adapter_model.safetensors"
_OUTSIDE: Final = "trained_beside_adapter.safetensors"


class TrainingState(Protocol):
    """What a checkpoint holds: weights, accumulated gradients, optimizer, random state, and the number of steps."""

    module: nn.Module
    parameters: dict[str, nn.Parameter]
    accumulator: Accumulator
    optimizer: Optimizer
    generator: torch.Generator
    weights_version: int


def save_checkpoint(
    state: TrainingState, root: Path, name: str, overwrite: bool, ledger: Ledger, *, everything: bool = True
) -> str:
    """Write everything that the next step depends on, or the weights alone; return the folder.

    Raises:
        CheckpointError: the name leaves the folder, or is taken.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise CheckpointError(f"checkpoint name {name!r} must be letters, digits, '.', '_' and '-' (no folders)")
    final = root / name
    if final.exists() and not overwrite:
        raise CheckpointError(f"checkpoint {final} exists; choose another name or pass overwrite=True")
    with unfinished(final) as folder:
        _write(state, folder, ledger, everything)
    return str(final)


@contextmanager
def unfinished(final: Path) -> Iterator[Path]:
    """Give a folder to write into, which then takes its place at once; after a failure nothing has changed."""
    final.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    try:
        yield folder
        for path in folder.iterdir():
            _sync(path)
        _replace(folder, final)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def load_checkpoint(state: TrainingState, folder: Path, *, everything: bool) -> Ledger:
    """Load weights, or everything; return the ledger of the gradients that came with it.

    All files are read and checked before anything changes.

    Raises:
        CheckpointError: missing, damaged, or of another model.
    """
    manifest = _manifest(folder)
    ledger = _ledger(folder, manifest) if everything else Ledger()
    apply = _checked(state.module, folder, manifest)
    kinds = ("optimizer", "window", "random") if everything else ()
    extras = {key: _read(folder, f"{key}.safetensors", manifest) for key in kinds}
    if everything:
        moments = {key.partition(":")[2] for key in extras["optimizer"]}
        _require_known(folder, {*extras["window"], *moments}, state.parameters)
    apply()
    state.accumulator.clear()
    state.optimizer.reset()
    state.weights_version = int(manifest["weights_version"])
    if not everything:
        return ledger
    state.optimizer.restore(extras["optimizer"])
    state.accumulator.restore(extras["window"])
    _restore_random(state, extras["random"])
    return ledger


def frozen_fingerprint(module: nn.Module) -> str:
    """Return a digest of the frozen parameters: names, shapes, and a sample of each one's numbers."""
    digest = hashlib.sha256()
    for name, p in sorted(module.named_parameters()):
        if not p.requires_grad:
            digest.update(f"{name}{tuple(p.shape)}".encode())
            for plain in plain_tensors(p.detach()):
                sample = plain.reshape(-1)[:: max(1, plain.numel() // 64)][:64].double().cpu()
                digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def load_weights(model: HFModel, folder: Path) -> None:
    """Load the weights of a checkpoint into a model of the same kind, for sampling.

    Raises:
        CheckpointError: missing, damaged, or of another model.
    """
    _checked(model, folder, _manifest(folder))()


def _checked(module: nn.Module, folder: Path, manifest: Mapping[str, Any]) -> Callable[[], None]:
    """Read a checkpoint's weights and check that they are this model's; return what copies them into it."""
    current = _weights(module)
    saved = {file: _read(folder, file, manifest) for file in current}
    alpha = checkpoint_alpha(module.model, folder) if _is_lora(module) else None
    for file, tensors in current.items():
        _require_same(folder, "weights", saved[file], tensors)
    if _OUTSIDE in manifest["files"] and _OUTSIDE not in current:
        raise CheckpointError(
            f"{folder} holds weights beside the adapter that are not trained here: see its {_OUTSIDE}"
        )
    if manifest["frozen"] != frozen_fingerprint(module):
        raise CheckpointError(f"{folder} was trained on other frozen weights than this model has")

    @torch.no_grad()
    def apply() -> None:
        for file, tensors in current.items():
            for name, tensor in tensors.items():
                tensor.copy_(saved[file][name])
        if alpha is not None:
            set_alpha(module.model, alpha)
        forget_casts()

    return apply


def _write(state: TrainingState, folder: Path, ledger: Ledger, everything: bool) -> None:
    files = _weights(state.module)
    if everything:
        files |= {
            "optimizer.safetensors": state.optimizer.to_tensors(),
            "window.safetensors": state.accumulator.gradients,
            "random.safetensors": _random_tensors(state),
        }
    for file, tensors in files.items():
        write_tensors(tensors, folder / file)
    if _is_lora(state.module):
        state.module.write_adapter_config(folder)
    manifest = {
        "format": FORMAT,
        "weights_version": state.weights_version,
        "operations": ledger.operations,
        "window": ledger.to_json(),
        "frozen": frozen_fingerprint(state.module),
        "files": {file: _digest(folder / file) for file in files},
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1))


def write_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write copies of tensors, which may share memory, as safetensors."""
    copied = {n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}
    save_file(copied, file, {"format": "pt"})


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
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{folder} is no checkpoint: it has no {_MANIFEST}") from error
    except ValueError as error:  # no JSON, or no text
        raise CheckpointError(f"{folder / _MANIFEST} is damaged: {error}") from error
    if not isinstance(manifest, dict):
        raise CheckpointError(f"{folder / _MANIFEST} is damaged: it holds a {type(manifest).__name__}, not a mapping")
    missing = sorted({"files", "frozen", "weights_version"} - set(manifest))
    if manifest.get("format") == FORMAT and missing:
        raise CheckpointError(f"{folder / _MANIFEST} is damaged: it lacks {', '.join(missing)}")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{folder} has format {manifest.get('format')!r}; this version reads {FORMAT}")
    return manifest


def _ledger(folder: Path, manifest: Mapping[str, Any]) -> Ledger:
    try:
        return Ledger.from_json(manifest["window"], int(manifest["operations"]))
    except (KeyError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{folder / _MANIFEST} is damaged: its accumulation cannot be read ({what})") from error


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


def _require_known(folder: Path, names: set[str], parameters: Mapping[str, nn.Parameter]) -> None:
    unknown = sorted(names - set(parameters))
    if unknown:
        raise CheckpointError(
            f"{folder} holds gradients or moments of parameters that are not trained here: {unknown[:5]}"
        )


def _is_lora(module: nn.Module) -> TypeGuard[HFModel]:
    return isinstance(module, HFModel) and module.is_lora


def _weights(module: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The live trained weights by file: an adapter in PEFT's naming and what is trained beside it, else every parameter
    and buffer once."""
    if _is_lora(module):
        outside = module.trained_outside()
        return {ADAPTER: module.adapter_weights()} | ({_OUTSIDE: outside} if outside else {})
    persistent = set(module.state_dict())
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {_WEIGHTS: {name: t.detach() for name, t in tensors if name in persistent}}


def _random_tensors(state: TrainingState) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state(), "sampling": state.generator.get_state()}
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return states | {f"cuda{i}": state for i, state in enumerate(cuda)}


def _restore_random(state: TrainingState, saved: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(saved["cpu"])
    state.generator.set_state(saved["sampling"])
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda{i}" in saved:
            torch.cuda.set_rng_state(saved[f"cuda{i}"], i)
