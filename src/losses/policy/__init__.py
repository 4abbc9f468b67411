"""Policy-gradient losses on sampled tokens."""

from __future__ import annotations

from .cispo import CISPO
from .dro import DRO
from .grpo import GRPO
from .gspo import GSPO
from .importance_sampling import ImportanceSampling
from .ppo import PPO

__all__ = ["CISPO", "DRO", "GRPO", "GSPO", "PPO", "ImportanceSampling"]
