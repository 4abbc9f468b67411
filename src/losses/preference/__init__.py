"""Losses on pairs of answers, a chosen and a rejected one, and on answers that are labelled one by one."""

from __future__ import annotations

from .dpo import DPO
from .kto import KTO
from .orpo import ORPO
from .simpo import SimPO

__all__ = ["DPO", "KTO", "ORPO", "SimPO"]
