"""Tools that prove losses and backends right: tiny exact models, strategies, oracles, properties."""

from __future__ import annotations

from .leaky import FutureLeakLM, PackingLeakLM, RowLeakLM
from .tiny import TinyLM

__all__ = ["FutureLeakLM", "PackingLeakLM", "RowLeakLM", "TinyLM"]
