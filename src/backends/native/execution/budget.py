"""How much memory a call may take, and less of it once memory has run out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar, final

import torch

from ....errors import ConfigError, UnsupportedError
from .batching import Layout
from .deferred_backward import Overflow, TapeSettings
from .memory import GraphMeter, ran_out, room_for_graphs

__all__ = ["Room"]

_logger = logging.getLogger(__name__)
_T = TypeVar("_T")


@final
@dataclass(eq=False)
class Room:
    """The two sizes that memory depends on, and the result never.

    Attributes:
        tokens: of one forward, padding included.
        graphs: bytes that the graphs of one call may hold together; None: half of what is free.
        overflow: what happens to graphs beyond it.
        meter: measures graphs.
        device: of the model.

    Raises:
        ConfigError: a size is out of range, or graphs would be moved to where they are.
    """

    tokens: int
    graphs: float | None
    overflow: Overflow
    meter: GraphMeter
    device: torch.device

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ConfigError(f"token_budget must be at least 1 token, got {self.tokens}")
        if self.graphs is not None and not self.graphs >= 0:
            raise ConfigError(f"activation_budget must be a number of bytes, got {self.graphs!r}")
        if self.overflow not in ("recompute", "offload"):
            raise ConfigError(f"overflow must be recompute or offload, got {self.overflow!r}")
        if self.overflow == "offload" and self.device.type == "cpu":
            raise ConfigError("overflow='offload' moves graphs to CPU memory, where this model's already are; drop it")

    def settings(self, layout: Layout) -> TapeSettings:
        """Return how forwards are kept now."""
        budget = room_for_graphs(self.device) if self.graphs is None else self.graphs
        return TapeSettings(layout, budget, self.overflow, self.meter)

    def fitting(self, attempt: Callable[[], _T], lengths: Sequence[int]) -> _T:
        """Run an attempt; where memory runs out, again in smaller forwards and with fewer graphs.

        Args:
            attempt: changes nothing if it fails, and asks for the sizes anew.
            lengths: of the sequences, tokens.

        Raises:
            UnsupportedError: one sequence alone does not fit.
        """
        longest = max(lengths)
        while True:
            try:
                return attempt()
            except RuntimeError as error:
                if not ran_out(error):
                    raise
                if self.tokens <= longest and self.graphs == 0:
                    raise UnsupportedError(
                        f"a datum of {longest} tokens does not fit into memory even alone; use gradient_checkpointing=True, "
                        "a smaller model or dtype, or shorter sequences"
                    ) from error
            self._shrink(longest, sum(lengths))

    def _shrink(self, longest: int, together: int) -> None:
        """Halve the forwards, and the graphs that wait, down to one."""
        self.tokens = max(longest, min(self.tokens, together) // 2)
        half = min(self.settings("single").budget, self.meter.predict(together)) / 2
        self.graphs = half if half > self.meter.predict(self.tokens) else 0.0
        _logger.warning("out of memory: token_budget is now %d, activation_budget %.0f bytes", self.tokens, self.graphs)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
