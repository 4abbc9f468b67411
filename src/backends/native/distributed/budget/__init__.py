"""What training costs one process: bytes that it holds, and bytes that it receives. Arithmetic alone."""

from __future__ import annotations

from .inputs import Placement, Step, Weight
from .memory import RankMemory, rank_memory
from .transfers import Traffic, traffic

__all__ = ["Placement", "RankMemory", "Step", "Traffic", "Weight", "rank_memory", "traffic"]
