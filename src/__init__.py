"""pullback: losses for post-training language models, and backends that pull them back through a model."""

from __future__ import annotations

__version__ = "0.1.0"
