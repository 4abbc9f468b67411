"""One safetensors file that all processes write or read together."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Container, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from .....errors import CheckpointError, UnsupportedError
from ...checkpoints.files import write_tensors
from ..agreement.agreement import Agreement
from ..ranks import Ranks

__all__ = ["OPTIMIZER", "RANDOM", "WINDOW", "ShardedFiles"]

OPTIMIZER: Final = "optimizer.safetensors"
WINDOW: Final = "window.safetensors"
RANDOM: Final = "random.safetensors"


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

    def as_saved(self, weights: Mapping[str, Tensor], buffers: Container[str] = ()) -> dict[str, Tensor]:
        """Return weights, some of which are buffers, in the dtype of one process, which is that of their file."""
        return {n: w.to(torch.bfloat16) if self.masters and n not in buffers else w for n, w in weights.items()}

    def write(self, tensors: Mapping[str, Tensor], file: Path) -> None:
        """Write tensors, each rank its shards, as one file."""
        whole = [name for name, tensor in tensors.items() if not tensor.is_floating_point()]
        if whole:
            raise UnsupportedError(f"{file.name} cannot hold the integers of {whole} when several processes write it")
        folder = file.with_suffix("")
        state = {name: t.detach().reshape(1) if t.dim() == 0 else t.detach() for name, t in tensors.items()}
        if state:
            writer = self.agreement.attempt(f"opening {file.name}", lambda: _writer(folder, state))
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
            with ExitStack() as stack:
                reader = self.agreement.attempt(f"opening {file.name}", lambda: _reader(file, stack))
                _checked(lambda: load(dict(found), storage_reader=reader, process_group=self.ranks.group))
        return found


def _writer(folder: Path, state: Mapping[str, Tensor]) -> HuggingFaceStorageWriter:
    return HuggingFaceStorageWriter(
        path=str(folder),
        save_distributed=True,
        enable_consolidation=True,
        fqn_to_index_mapping=dict.fromkeys(state, 1),
    )


def _reader(file: Path, stack: ExitStack) -> HuggingFaceStorageReader:
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    (Path(folder) / "model.safetensors").symlink_to(file.resolve())
    return HuggingFaceStorageReader(folder)


def _checked(work: Callable[[], Any]) -> None:
    try:
        work()
    except CheckpointException as error:  # no Exception, so that nobody would catch it
        first = next(iter(error.failures.items()))
        raise CheckpointError(f"rank {first[0]} could not write or read a checkpoint: {first[1][0]}") from error
