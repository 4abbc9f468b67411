"""What training costs one process: bytes that it holds, and bytes that it receives. Arithmetic alone."""

from __future__ import annotations

from .memory import Placement, RankMemory, Step, Traffic, Weight, rank_memory, traffic

__all__ = ["Placement", "RankMemory", "Step", "Traffic", "Weight", "rank_memory", "traffic"]
