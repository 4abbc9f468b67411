"""One layout of several sequences, whatever their lengths: to examine it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from ...backends.native.backend import TorchBackend
from ...backends.native.execution.batching import Layout
from ...backends.native.models.facts.probes import LayoutLimits

__all__ = ["using_layout"]


@contextmanager
def using_layout(backend: TorchBackend, layout: Layout) -> Iterator[None]:
    """Let a backend use one layout for a while, known to be exact or not; its model is not probed anew."""
    engine = backend._native
    before = engine.scheduler
    engine.scheduler = replace(before, layouts=LayoutLimits.whatever_the_length(layout))
    try:
        yield
    finally:
        engine.scheduler = before
