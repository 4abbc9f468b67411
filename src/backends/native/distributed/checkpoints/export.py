"""A sharded model, gathered into the main memory of the first process and written for others."""

from __future__ import annotations

from ...checkpoints.export import Export
from ...dtensors import full
from ..agreement.agreement import Agreement
from .files import ShardedFiles

__all__ = ["export_sharded"]


def export_sharded(export: Export, files: ShardedFiles, agreement: Agreement) -> str:
    """Gather the weights, one after the other, on rank 0, which writes them; return where."""
    whole = {}
    with agreement.together("gathering of weights"):
        for name, tensor in export.weights().items():
            gathered = full(tensor.detach())
            if files.first:
                whole[name] = gathered.cpu()

    def write() -> str:
        return export.write(files.as_saved(whole)) if files.first else str(export.folder)

    return agreement.attempt("writing", write)
