"""Policy-gradient losses on sampled tokens."""

from __future__ import annotations

from .grpo import GRPO
from .importance_sampling import ImportanceSampling
from .ppo import PPO

__all__ = ["GRPO", "PPO", "ImportanceSampling"]
