"""VerlEngineBackend: the protocol on an engine of verl's."""

from __future__ import annotations

from pathlib import Path
from typing import Any, final

from ..base import Backend
from .engine import VerlEngine

__all__ = ["VerlEngineBackend"]


@final
class VerlEngineBackend(Backend):
    """Trains the model of an initialised ``FSDPEngineWithLMHead`` (verl 0.9).

    Every process makes one, is given the same data and returns the same results. See docs/verl.md.

    Args:
        engine: says how large micro-batches are (``use_dynamic_bsz``, ``max_token_len_per_gpu``,
            ``micro_batch_size_per_gpu``).
        checkpoint_dir: where `save_state` writes; all processes must see it.
        timeout: seconds that a process waits for the others; None: PyTorch's default.

    Raises:
        UnsupportedError: the engine cannot be trained so; says why.
        ConfigError: it does not say how large micro-batches are.
    """

    def __init__(
        self, engine: Any, *, checkpoint_dir: str | Path = "checkpoints", timeout: float | None = None
    ) -> None:
        super().__init__(VerlEngine(engine, Path(checkpoint_dir), timeout))
