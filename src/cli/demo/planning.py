"""How many steps fit into the demo's minutes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

__all__ = ["Budget", "plan_steps"]


@final
@dataclass(frozen=True)
class Budget:
    """Steps of one objective, after how many it is evaluated, and the seconds it may take."""

    steps: int
    every: int
    seconds: float


def plan_steps(seconds: float, step_seconds: float, evaluation_seconds: float, steps: tuple[int, int]) -> Budget:
    """Fill ``seconds`` with steps and three or four evaluations (the first one comes before any step).

    Args:
        seconds: for this objective, without loading.
        step_seconds, evaluation_seconds: as measured.
        steps: fewest (even if they do not fit) and most.
    """
    fewest, most = steps
    seconds_for_steps = max(0.0, seconds - 5 * evaluation_seconds)
    count = max(fewest, min(most, int(seconds_for_steps / max(step_seconds, 1e-9))))
    return Budget(count, max(1, -(-count // 4)), max(0.0, seconds))
