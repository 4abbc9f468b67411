"""A checkpoint of one process or of many, read by all processes; checked by each before anything changes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .....errors import CheckpointError
from ....operations.normalization import Ledger
from ...checkpoints.checkpoint import (
    TrainingState,
    frozen_fingerprint,
    is_lora,
    require_known,
    restore_random,
    trained_weights,
)
from ...checkpoints.files import (
    read_manifest,
    read_tensors,
    require_there,
    require_undamaged,
    saved_ledger,
)
from ...models.lora import checkpoint_alpha, set_alpha
from ...optimizer import forget_casts
from .files import OPTIMIZER, RANDOM, WINDOW, ShardedFiles

__all__ = ["load_sharded"]

_Files = dict[str, dict[str, Tensor]]  # tensors by name, by file


def load_sharded(state: TrainingState, files: ShardedFiles, folder: Path, *, everything: bool) -> Ledger:
    """Load weights, or everything; return the ledger of the gradients that came with it.

    All files are read and checked on every rank before anything changes.

    Raises:
        CheckpointError: missing, damaged, or of another model.
    """
    manifest = files.agreement.attempt("manifest", lambda: _sound(files, folder, everything))
    ledger = files.agreement.attempt("ledger", lambda: saved_ledger(folder, manifest) if everything else Ledger())
    weights, buffers = trained_weights(state.module), dict(state.module.named_buffers())
    fingerprint = frozen_fingerprint(state.module)

    def check() -> _Files:
        if manifest["frozen"] != fingerprint:
            raise CheckpointError(f"{folder} was trained on other frozen weights than this model has")
        for file in weights:
            require_there(folder, file, manifest)
        as_saved = {file: files.as_saved(tensors, buffers) for file, tensors in weights.items()}
        return _fitting(folder, as_saved | (_training_like(state, folder) if everything else {}))

    like = files.agreement.attempt("weights", check)
    loaded = {file: files.read(tensors, folder / file) for file, tensors in like.items()}
    random = files.agreement.attempt("random state", lambda: _read_random(folder, manifest, everything))
    moments, gradients = loaded.pop(OPTIMIZER, {}), loaded.pop(WINDOW, {})
    state.weights = object()
    with state.optimizer.loading():
        _apply(state, folder, weights, loaded)
        state.accumulator.clear()
        state.optimizer.reset()
        state.weights_version = int(manifest["weights_version"])
        if everything:
            _apply_everything(state, moments, gradients, random)
        # Where a rank has failed, what the others have loaded counts as interrupted.
        files.agreement.meet("loaded", undone=False)
    return ledger


@torch.no_grad()
def _apply_everything(
    state: TrainingState, moments: dict[str, Tensor], gradients: Mapping[str, Tensor], random: Mapping[str, Tensor]
) -> None:
    for name, p in state.parameters.items():
        master = moments.pop(f"master:{name}", None)
        if master is not None:
            p.copy_(master)
    state.optimizer.restore(moments)
    state.accumulator.restore(gradients)
    restore_random(state, random)


def _read_random(folder: Path, manifest: Mapping[str, Any], everything: bool) -> Mapping[str, Tensor]:
    return read_tensors(folder, RANDOM, manifest) if everything else {}


def _sound(files: ShardedFiles, folder: Path, everything: bool) -> dict[str, Any]:
    """Return the manifest; rank 0 checks the files."""
    manifest = read_manifest(folder)
    needed = [OPTIMIZER, WINDOW, RANDOM] if everything else []
    for file in {*needed, *manifest["files"]} if everything else manifest["files"]:
        require_there(folder, file, manifest)
        if files.first:
            require_undamaged(folder, file, manifest)
    return manifest


def _fitting(folder: Path, like: _Files) -> _Files:
    """Return what the files of a folder are to be like; all of them are."""
    for file, tensors in like.items():
        _require_same(folder, file, tensors)
    return like


def _require_same(folder: Path, file: str, expected: Mapping[str, Tensor]) -> None:
    """Check names, shapes and dtypes of a file, of which only the head is read.

    Raises:
        CheckpointError: they are others.
    """
    saved = _forms(folder / file)
    here = {name: (list(tensor.shape), tensor.dtype) for name, tensor in expected.items()}
    differing = sorted(saved.keys() ^ here.keys()) or [
        f"{name} {saved[name][0]} {saved[name][1]}, here {shape} {dtype}"
        for name, (shape, dtype) in here.items()
        if saved[name] != (shape, dtype)
    ]
    if differing:
        raise CheckpointError(
            f"{file} of {folder} is not of this model as it is loaded here; it differs in: {differing[:5]}"
        )


def _forms(file: Path) -> dict[str, tuple[list[int], torch.dtype]]:
    """Return shape and dtype of each tensor of a file, in the same order on every rank."""
    with safe_open(file, "pt") as saved:
        slices = {name: saved.get_slice(name) for name in sorted(saved.keys())}
        shapes = {name: list(each.get_shape()) for name, each in slices.items()}
        nothing = {name: each[:0] if shapes[name] else saved.get_tensor(name) for name, each in slices.items()}
    return {name: (shape, nothing[name].dtype) for name, shape in shapes.items()}


def _training_like(state: TrainingState, folder: Path) -> _Files:
    return {OPTIMIZER: _moments_like(state, folder), WINDOW: _gradients_like(state, folder)}


def _moments_like(state: TrainingState, folder: Path) -> dict[str, Tensor]:
    """Return what the moments of a checkpoint must be like: the parameters that they are of, which are fp32 masters where
    one process has half-precision weights; numbers of steps are what they are."""
    forms = _forms(folder / OPTIMIZER)
    require_known(folder, {key.partition(":")[2] for key in forms}, state.parameters)
    return {
        key: torch.zeros(shape, dtype=dtype)
        if key.startswith("step:")
        else state.parameters[key.partition(":")[2]].detach()
        for key, (shape, dtype) in forms.items()
    }


def _gradients_like(state: TrainingState, folder: Path) -> dict[str, Tensor]:
    names = _forms(folder / WINDOW)
    require_known(folder, set(names), state.parameters)
    return {name: state.parameters[name].detach() for name in names}


@torch.no_grad()
def _apply(
    state: TrainingState,
    folder: Path,
    weights: Mapping[str, Mapping[str, Tensor]],
    loaded: Mapping[str, Mapping[str, Tensor]],
) -> None:
    for file, tensors in weights.items():
        for name, tensor in tensors.items():
            tensor.copy_(loaded[file][name])
    alpha = checkpoint_alpha(state.module.model, folder) if is_lora(state.module) else None
    if is_lora(state.module) and alpha is not None:
        set_alpha(state.module.model, alpha)
    forget_casts()
