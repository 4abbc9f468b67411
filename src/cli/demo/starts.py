"""Where the demo trains: on a native backend, or on a service of its own; the script does not see the difference."""

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
from .models import Studio

__all__ = ["Start", "native", "served", "starting"]

Start = Callable[[], PolicyBackend]


@contextmanager
def starting(studio: Studio, backend: str) -> Iterator[Start]:
    """Yield what makes a backend on fresh adapters, any number of times; a service lives as long as the block."""
    if backend == "native":
        yield lambda: native(studio)
        return
    with tempfile.TemporaryDirectory() as folder, serving(ServedModels(studio.base, Path(folder))) as url:
        yield lambda: served(studio, url)


def native(studio: Studio) -> TorchBackend:
    """Return a native backend on the adapters that a service would make."""
    return TorchBackend(studio.base.adapted(studio.lora), **studio.base.options)


def served(studio: Studio, url: str) -> RemoteBackend:
    """Return a backend on a service that serves the studio's base."""
    lora = {name: getattr(studio.lora, name) for name in ("seed", "train_attn", "train_mlp", "train_unembed")}
    return connect(url, base_model=studio.base.name, rank=studio.lora.rank, lora=lora)
