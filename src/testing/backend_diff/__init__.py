"""Where two backends diverge: log-probs, loss, cotangent, gradient, update, in this order."""

from __future__ import annotations

from .compare import diff
from .results import STAGES, BackendDiff, LayerDiff, StageDiff, TokenDiff
from .tolerances import TOLERANCES, Tolerance

__all__ = ["STAGES", "TOLERANCES", "BackendDiff", "LayerDiff", "StageDiff", "TokenDiff", "Tolerance", "diff"]
