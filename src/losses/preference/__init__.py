"""Losses on pairs of answers, a chosen and a rejected one."""

from __future__ import annotations

from .dpo import DPO
from .orpo import ORPO
from .simpo import SimPO

__all__ = ["DPO", "ORPO", "SimPO"]
