"""Checkpoints: safetensors and a JSON manifest in one folder, written atomically, no pickle."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any, Final, Protocol, TypeGuard

import torch
from torch import Tensor, nn

from ....errors import CheckpointError
from ...operations.normalization import Ledger
from ..accumulator import Accumulator
from ..dtensors import full
from ..models.facts.quantized import sampled_numbers
from ..models.hf import HFModel
from ..models.lora import checkpoint_alpha, set_alpha
from ..optimizer import Optimizer, forget_casts
from .files import (
    FORMAT,
    MANIFEST,
    file_digest,
    new_folder,
    read_manifest,
    read_tensors,
    saved_ledger,
    tensors_size,
    unfinished,
    write_tensors,
)

__all__ = [
    "ADAPTER",
    "OUTSIDE",
    "checkpoint_bytes",
    "fingerprint",
    "frozen_fingerprint",
    "is_lora",
    "load_checkpoint",
    "load_weights",
    "random_tensors",
    "require_known",
    "require_same",
    "restore_random",
    "save_checkpoint",
    "trained_weights",
    "write_manifest",
]

_WEIGHTS: Final = "weights.safetensors"
ADAPTER: Final = "adapter_model.safetensors"
OUTSIDE: Final = "trained_beside_adapter.safetensors"
_OPTIMIZER: Final = "optimizer.safetensors"


class TrainingState(Protocol):
    """What a checkpoint holds: weights, accumulated gradients, optimizer, random state, and the number of steps.

    Attributes:
        weights: another object whenever they change.
    """

    module: nn.Module
    parameters: dict[str, nn.Parameter]
    accumulator: Accumulator
    optimizer: Optimizer
    generator: torch.Generator
    weights: object
    weights_version: int


def save_checkpoint(
    state: TrainingState, root: Path, name: str, overwrite: bool, ledger: Ledger, *, everything: bool = True
) -> str:
    """Write everything that the next step depends on, or the weights alone; return the folder.

    Raises:
        CheckpointError: the name leaves the folder, or is taken.
    """
    final = new_folder(root, name, overwrite)
    with unfinished(final) as folder:
        _write(state, folder, ledger, everything)
    return str(final)


def checkpoint_bytes(state: TrainingState, ledger: Ledger, *, everything: bool = True) -> int:
    """Return how many bytes `save_checkpoint` would write now; nothing is written where checkpoints lie.

    Of weights that several processes train, what they would write together; the heads of their files are a little longer.
    """
    files = _with_masters(state, _files(state, everything))
    with tempfile.TemporaryDirectory() as scratch:
        if is_lora(state.module):
            state.module.write_adapter_config(Path(scratch))
        config = sum(file.stat().st_size for file in Path(scratch).iterdir())
    digest = "0" * 2 * hashlib.sha256().digest_size
    manifest = _manifest(state, ledger, dict.fromkeys(files, digest), digest)
    return sum(map(tensors_size, files.values())) + config + len(manifest.encode())


def load_checkpoint(state: TrainingState, folder: Path, *, everything: bool) -> Ledger:
    """Load weights, or everything; return the ledger of the gradients that came with it.

    All files are read and checked before anything changes.

    Raises:
        CheckpointError: missing, damaged, or of another model.
    """
    manifest = read_manifest(folder)
    ledger = saved_ledger(folder, manifest) if everything else Ledger()
    apply = _checked(state.module, folder, manifest)
    kinds = ("optimizer", "window", "random") if everything else ()
    extras = {key: read_tensors(folder, f"{key}.safetensors", manifest) for key in kinds}
    if everything:
        moments = {key.partition(":")[2] for key in extras["optimizer"]}
        require_known(folder, {*extras["window"], *moments}, state.parameters)
    state.weights = object()
    with state.optimizer.loading():
        apply()
        state.accumulator.clear()
        state.optimizer.reset()
        state.weights_version = int(manifest["weights_version"])
        if everything:
            state.optimizer.restore(extras["optimizer"])
            state.accumulator.restore(extras["window"])
            restore_random(state, extras["random"])
    return ledger


def frozen_fingerprint(module: nn.Module) -> str:
    """Return the fingerprint of the frozen parameters."""
    return fingerprint(p for p in module.named_parameters() if not p[1].requires_grad)


def fingerprint(parameters: Iterable[tuple[str, nn.Parameter]]) -> str:
    """Return a digest of named parameters: names, shapes, and a sample of each one's numbers."""
    digest = hashlib.sha256()
    for name, p in sorted(parameters, key=itemgetter(0)):
        digest.update(f"{name}{tuple(p.shape)}".encode())
        for sample in sampled_numbers(full(p.detach())):
            digest.update(sample.double().cpu().numpy().tobytes())
    return digest.hexdigest()


def load_weights(model: HFModel, folder: Path) -> None:
    """Load the weights of a checkpoint into a model of the same kind, for sampling.

    Raises:
        CheckpointError: missing, damaged, or of another model.
    """
    _checked(model, folder, read_manifest(folder))()


def _checked(module: nn.Module, folder: Path, manifest: Mapping[str, Any]) -> Callable[[], None]:
    """Read a checkpoint's weights and check that they are this model's; return what copies them into it."""
    current = trained_weights(module)
    saved = {file: read_tensors(folder, file, manifest) for file in current}
    alpha = checkpoint_alpha(module.model, folder) if is_lora(module) else None
    for file, tensors in current.items():
        require_same(folder, "weights", saved[file], tensors)
    if OUTSIDE in manifest["files"] and OUTSIDE not in current:
        raise CheckpointError(f"{folder} holds weights beside the adapter that are not trained here: see its {OUTSIDE}")
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


def _files(state: TrainingState, everything: bool) -> dict[str, dict[str, Tensor]]:
    files = trained_weights(state.module)
    if everything:
        files |= {
            _OPTIMIZER: state.optimizer.to_tensors(),
            "window.safetensors": state.accumulator.gradients,
            "random.safetensors": random_tensors(state),
        }
    return files


def _with_masters(state: TrainingState, files: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Return what is written where fp32 shards stand for bfloat16 weights: these, and the shards beside the moments."""
    if not any(hasattr(p, "full_tensor") for p in state.parameters.values()):
        return files
    from ..distributed.fsdp import gathered_dtype

    half = gathered_dtype(state.module)
    if half is None:
        return files
    buffers = dict(state.module.named_buffers())
    for file in trained_weights(state.module).keys() - {ADAPTER, OUTSIDE}:
        shards = {name: w for name, w in files[file].items() if name not in buffers}
        files[file] |= {name: torch.empty(w.shape, dtype=half, device="meta") for name, w in shards.items()}
    if _OPTIMIZER in files:
        files[_OPTIMIZER] |= {f"master:{name}": p.detach() for name, p in state.parameters.items()}
    return files


def _write(state: TrainingState, folder: Path, ledger: Ledger, everything: bool) -> None:
    files = _files(state, everything)
    for file, tensors in files.items():
        write_tensors(tensors, folder / file)
    write_manifest(state, folder, ledger, files, frozen_fingerprint(state.module))


def write_manifest(state: TrainingState, folder: Path, ledger: Ledger, files: Iterable[str], fingerprint: str) -> None:
    """Write what makes files a checkpoint; last, as a folder without it is none."""
    if is_lora(state.module):
        state.module.write_adapter_config(folder)
    digests = {file: file_digest(folder / file) for file in files}
    (folder / MANIFEST).write_text(_manifest(state, ledger, digests, fingerprint))


def _manifest(state: TrainingState, ledger: Ledger, digests: Mapping[str, str], frozen: str) -> str:
    manifest = {
        "format": FORMAT,
        "weights_version": state.weights_version,
        "operations": ledger.operations,
        "window": ledger.to_json(),
        "frozen": frozen,
        "files": digests,
    }
    return json.dumps(manifest, indent=1)


def require_same(folder: Path, what: str, saved: Mapping[str, Tensor], current: Mapping[str, Tensor]) -> None:
    differing = sorted(set(saved) ^ set(current)) or [
        f"{n} {tuple(saved[n].shape)} {saved[n].dtype}, here {tuple(current[n].shape)} {current[n].dtype}"
        for n in saved
        if saved[n].shape != current[n].shape or saved[n].dtype != current[n].dtype
    ]
    if differing:
        raise CheckpointError(f"the {what} of {folder} are not those of this model; they differ in: {differing[:5]}")


def require_known(folder: Path, names: set[str], parameters: Mapping[str, nn.Parameter]) -> None:
    unknown = sorted(names - set(parameters))
    if unknown:
        raise CheckpointError(
            f"{folder} holds gradients or moments of parameters that are not trained here: {unknown[:5]}"
        )


def is_lora(module: nn.Module) -> TypeGuard[HFModel]:
    return isinstance(module, HFModel) and module.is_lora


def trained_weights(module: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The live trained weights by file: an adapter in PEFT's naming and what is trained beside it, else every parameter
    and buffer once."""
    if is_lora(module):
        outside = module.trained_outside()
        return {ADAPTER: module.adapter_weights()} | ({OUTSIDE: outside} if outside else {})
    persistent = set(module.state_dict())
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {_WEIGHTS: {name: t.detach() for name, t in tensors if name in persistent}}


def random_tensors(state: TrainingState) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state(), "sampling": state.generator.get_state()}
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return states | {f"cuda{i}": state for i, state in enumerate(cuda)}


def restore_random(state: TrainingState, saved: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(saved["cpu"])
    state.generator.set_state(saved["sampling"])
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda{i}" in saved:
            torch.cuda.set_rng_state(saved[f"cuda{i}"], i)
