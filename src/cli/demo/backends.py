"""Backends for the demo: native, or on a service that the demo starts. The objectives do not see the difference."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ...backends import TorchBackend, connect
from ...backends.protocol import PolicyBackend
from ...backends.remote import RemoteBackend
from ...service.http.server import serving
from ...service.served.registry import ServedModels
from .models import DemoModel

__all__ = ["MakeBackend", "backend_maker", "native", "served"]

MakeBackend = Callable[[], PolicyBackend]


@contextmanager
def backend_maker(model: DemoModel, backend: str) -> Iterator[MakeBackend]:
    """Yield a function that makes a backend on a fresh adapter; a service runs as long as the block."""
    if backend == "native":
        yield lambda: native(model)
        return
    with tempfile.TemporaryDirectory() as folder, serving(ServedModels(model.base, Path(folder))) as url:
        yield lambda: served(model, url)


def native(model: DemoModel) -> TorchBackend:
    """Return a native backend on the adapter that a service would make."""
    return TorchBackend(model.base.adapted(model.lora), **model.base.options)


def served(model: DemoModel, url: str) -> RemoteBackend:
    """Return a backend on a service that serves the base model."""
    lora = {name: getattr(model.lora, name) for name in ("seed", "train_attn", "train_mlp", "train_unembed")}
    return connect(url, base_model=model.base.name, rank=model.lora.rank, lora=lora)
