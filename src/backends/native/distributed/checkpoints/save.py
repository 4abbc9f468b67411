"""A checkpoint of a sharded model, written by all processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from torch import Tensor

from ....operations.normalization import Ledger
from ...checkpoints.checkpoint import (
    ADAPTER,
    OUTSIDE,
    TrainingState,
    frozen_fingerprint,
    random_tensors,
    trained_weights,
    write_manifest,
)
from ...checkpoints.files import new_folder, unfinished, write_tensors
from ...dtensors import full
from ..agreement.agreement import Agreement
from ..ranks import Ranks
from .files import OPTIMIZER, RANDOM, WINDOW, ShardedFiles

__all__ = ["save_sharded", "shared_folder"]


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
    with shared_folder(files.ranks, files.agreement, final_folder) as folder:
        written = _write_weights(state, files, folder)
        if everything:
            files.write(_moments(state, files.masters), folder / OPTIMIZER)
            files.write(state.accumulator.gradients, folder / WINDOW)
            written += [OPTIMIZER, WINDOW, RANDOM]

        def finish() -> None:
            if files.first:
                if everything:
                    write_tensors(random_tensors(state), folder / RANDOM)
                write_manifest(state, folder, ledger, written, fingerprint)

        files.agreement.attempt("manifest", finish)
    return str(final_folder)


@contextmanager
def shared_folder(ranks: Ranks, agreement: Agreement, final_folder: Path) -> Iterator[Path]:
    """Give every rank the folder that rank 0 makes, and that takes its place when all have written."""
    with ExitStack() as stack:
        own = agreement.attempt(
            "folder", lambda: str(stack.enter_context(unfinished(final_folder))) if ranks.rank == 0 else ""
        )
        yield Path(ranks.broadcast_text(own))
        agreement.meet("all written")
    agreement.meet("checkpoint in place")


def _write_weights(state: TrainingState, files: ShardedFiles, folder: Path) -> list[str]:
    named, buffers = trained_weights(state.module), dict(state.module.named_buffers())
    for file, tensors in named.items():
        if file in (ADAPTER, OUTSIDE):  # small, and PEFT's own format: one rank writes it
            whole = {name: full(tensor) for name, tensor in tensors.items()}
            files.agreement.attempt(f"writing {file}", partial(_write_if_first, files, whole, folder / file))
        else:
            files.write(files.as_saved(tensors, buffers), folder / file)
    return [*named]


def _write_if_first(files: ShardedFiles, tensors: Mapping[str, Tensor], file: Path) -> None:
    if files.first:
        write_tensors(tensors, file)


def _moments(state: TrainingState, masters: bool) -> dict[str, Tensor]:
    kept = {f"master:{name}": p.detach() for name, p in state.parameters.items()} if masters else {}
    return {**kept, **state.optimizer.to_tensors()}
