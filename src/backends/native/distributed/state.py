"""Checkpoints of a sharded model: the files of one process, which any number of processes writes and reads."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from ....errors import CheckpointError, UnsupportedError
from ...normalization import Ledger
from ..checkpoints.checkpoint import (
    ADAPTER,
    OUTSIDE,
    TrainingState,
    frozen_fingerprint,
    is_lora,
    random_tensors,
    require_known,
    restore_random,
    trained_weights,
    write_manifest,
)
from ..checkpoints.files import (
    new_folder,
    read_manifest,
    read_tensors,
    require_there,
    require_undamaged,
    saved_ledger,
    unfinished,
    write_tensors,
)
from ..dtensors import full
from ..models.lora import checkpoint_alpha, set_alpha
from ..optimizer import forget_casts
from .agreement import Agreement
from .ranks import Ranks

__all__ = ["ShardedFiles", "load_sharded", "save_sharded"]

_OPTIMIZER, _WINDOW, _RANDOM = "optimizer.safetensors", "window.safetensors", "random.safetensors"


@final
class ShardedFiles:
    """Writes and reads one safetensors file from all ranks, by PyTorch's distributed checkpoints, without pickle.

    Args:
        ranks: the processes, which see one file system.
        agreement: of them.
        masters: the shards are fp32 masters of weights that one process keeps in bfloat16.
    """

    def __init__(self, ranks: Ranks, agreement: Agreement, masters: bool) -> None:
        self.ranks, self.agreement, self.masters = ranks, agreement, masters

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes what is no tensor."""
        return self.ranks.rank == 0

    def as_saved(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return weights in the dtype in which one process has them, which is that of their file."""
        return {name: w.to(torch.bfloat16) if self.masters else w for name, w in weights.items()}

    def write(self, tensors: Mapping[str, Tensor], file: Path) -> None:
        """Write tensors, each rank its shards, as one file."""
        whole = [name for name, tensor in tensors.items() if not tensor.is_floating_point()]
        if whole:
            raise UnsupportedError(f"{file.name} cannot hold the integers of {whole} when several processes write it")
        folder = file.with_suffix("")
        state = {name: t.detach().reshape(1) if t.dim() == 0 else t.detach() for name, t in tensors.items()}
        if state:
            writer = HuggingFaceStorageWriter(
                path=str(folder),
                save_distributed=True,
                enable_consolidation=True,
                fqn_to_index_mapping=dict.fromkeys(state, 1),
            )
            _checked(lambda: save(dict(state), storage_writer=writer, process_group=self.ranks.group))
        self.agreement.attempt(f"writing {file.name}", lambda: self._take_over(folder, file, bool(state)))

    def _take_over(self, folder: Path, file: Path, written: bool) -> None:
        """Let the one file that was written stand for the folder."""
        if not self.first:
            return
        if not written:
            write_tensors({}, file)
            return
        (consolidated,) = folder.glob("*.safetensors")
        consolidated.rename(file)
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        folder.rmdir()

    def read(self, like: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
        """Return tensors of a file, sharded like those that are given, which stay as they are."""
        found = {name: torch.empty_like(tensor) for name, tensor in like.items()}
        if found:
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "model.safetensors").symlink_to(file.resolve())
                reader = HuggingFaceStorageReader(folder)
                _checked(lambda: load(dict(found), storage_reader=reader, process_group=self.ranks.group))
        return found


def _checked(work: Callable[[], Any]) -> None:
    try:
        work()
    except CheckpointException as error:  # no Exception, so that nobody would catch it
        first = next(iter(error.failures.items()))
        raise CheckpointError(f"rank {first[0]} could not write or read a checkpoint: {first[1][0]}") from error


def save_sharded(
    state: TrainingState,
    files: ShardedFiles,
    root: Path,
    name: str,
    overwrite: bool,
    ledger: Ledger,
    *,
    everything: bool,
) -> str:
    """Write everything that the next step depends on, or the weights alone; return the folder.

    Raises:
        CheckpointError: the name leaves the folder, or is taken.
    """
    final_folder = files.agreement.attempt("name", lambda: new_folder(root, name, overwrite))
    fingerprint = frozen_fingerprint(state.module)
    with _shared_folder(files, final_folder) as folder:
        written = _write_weights(state, files, folder)
        if everything:
            files.write(_moments(state, files.masters), folder / _OPTIMIZER)
            files.write(state.accumulator.gradients, folder / _WINDOW)
            written += [_OPTIMIZER, _WINDOW, _RANDOM]

        def finish() -> None:
            if files.first:
                if everything:
                    write_tensors(random_tensors(state), folder / _RANDOM)
                write_manifest(state, folder, ledger, written, fingerprint)

        files.agreement.attempt("manifest", finish)
    files.agreement.meet("checkpoint in place")
    return str(final_folder)


@contextmanager
def _shared_folder(files: ShardedFiles, final_folder: Path) -> Iterator[Path]:
    """Give every rank the folder that rank 0 makes, and that takes its place when all have written."""
    with ExitStack() as stack:
        own = files.agreement.attempt(
            "folder", lambda: str(stack.enter_context(unfinished(final_folder))) if files.first else ""
        )
        yield Path(files.ranks.broadcast_text(own))


def _write_weights(state: TrainingState, files: ShardedFiles, folder: Path) -> list[str]:
    named = trained_weights(state.module)
    for file, tensors in named.items():
        if file in (ADAPTER, OUTSIDE):  # small, and PEFT's own format: one rank writes it
            whole = {name: full(tensor) for name, tensor in tensors.items()}
            files.agreement.attempt(f"writing {file}", partial(_write_if_first, files, whole, folder / file))
        else:
            files.write(files.as_saved(tensors), folder / file)
    return [*named]


def _write_if_first(files: ShardedFiles, tensors: Mapping[str, Tensor], file: Path) -> None:
    if files.first:
        write_tensors(tensors, file)


def _moments(state: TrainingState, masters: bool) -> dict[str, Tensor]:
    kept = {f"master:{name}": p.detach() for name, p in state.parameters.items()} if masters else {}
    return {**kept, **state.optimizer.to_tensors()}


def load_sharded(state: TrainingState, files: ShardedFiles, folder: Path, *, everything: bool) -> Ledger:
    """Load weights, or everything; return the ledger of the gradients that came with it.

    All files are read and checked on every rank before anything changes.

    Raises:
        CheckpointError: missing, damaged, or of another model.
    """
    manifest = files.agreement.attempt("manifest", lambda: _sound(files, folder, everything))
    fingerprint = frozen_fingerprint(state.module)
    ledger = files.agreement.attempt("ledger", lambda: saved_ledger(folder, manifest) if everything else Ledger())
    weights = trained_weights(state.module)

    def check() -> None:
        if manifest["frozen"] != fingerprint:
            raise CheckpointError(f"{folder} was trained on other frozen weights than this model has")
        for file, tensors in weights.items():
            require_there(folder, file, manifest)
            _require_same(folder, file, tensors)

    files.agreement.attempt("weights", check)
    loaded = {file: files.read(files.as_saved(tensors), folder / file) for file, tensors in weights.items()}
    moments = _read_moments(state, files, folder) if everything else {}
    gradients = _read_like(state, files, folder / _WINDOW) if everything else {}
    random = files.agreement.attempt("random state", lambda: _read_random(folder, manifest, everything))
    state.weights = object()
    _apply(state, folder, weights, loaded)
    state.accumulator.clear()
    state.optimizer.reset()
    state.weights_version = int(manifest["weights_version"])
    if everything:
        with torch.no_grad():
            for name, p in state.parameters.items():
                master = moments.pop(f"master:{name}", None)
                if master is not None:
                    p.copy_(master)
        state.optimizer.restore(moments)
        state.accumulator.restore(gradients)
        restore_random(state, random)
    return ledger


def _read_random(folder: Path, manifest: Mapping[str, Any], everything: bool) -> Mapping[str, Tensor]:
    return read_tensors(folder, _RANDOM, manifest) if everything else {}


def _sound(files: ShardedFiles, folder: Path, everything: bool) -> dict[str, Any]:
    """Return the manifest; rank 0 checks the files."""
    manifest = read_manifest(folder)
    needed = [_OPTIMIZER, _WINDOW, _RANDOM] if everything else []
    for file in {*needed, *manifest["files"]} if everything else manifest["files"]:
        require_there(folder, file, manifest)
        if files.first:
            require_undamaged(folder, file, manifest)
    return manifest


def _require_same(folder: Path, file: str, tensors: Mapping[str, Tensor]) -> None:
    with safe_open(folder / file, "pt") as saved:
        names = set(saved.keys())
        differing = sorted(names ^ set(tensors)) or [
            f"{name} {saved.get_slice(name).get_shape()}, here {list(tensor.shape)}"
            for name, tensor in tensors.items()
            if list(saved.get_slice(name).get_shape()) != list(tensor.shape)
        ]
    if differing:
        raise CheckpointError(f"the weights of {folder} are not those of this model; they differ in: {differing[:5]}")


def _shapes(file: Path) -> dict[str, list[int]]:
    with safe_open(file, "pt") as saved:
        return {name: list(saved.get_slice(name).get_shape()) for name in set(saved.keys())}


def _read_moments(state: TrainingState, files: ShardedFiles, folder: Path) -> dict[str, Tensor]:
    shapes = _shapes(folder / _OPTIMIZER)
    require_known(folder, {key.partition(":")[2] for key in shapes}, state.parameters)
    like = {
        key: torch.zeros(shape) if key.startswith("step:") else state.parameters[key.partition(":")[2]].detach()
        for key, shape in shapes.items()
    }
    return files.read(like, folder / _OPTIMIZER)


def _read_like(state: TrainingState, files: ShardedFiles, file: Path) -> dict[str, Tensor]:
    names = set(_shapes(file))
    require_known(file.parent, names, state.parameters)
    return files.read({name: state.parameters[name].detach() for name in names}, file)


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
