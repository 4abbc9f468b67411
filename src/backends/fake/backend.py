"""FakeBackend: the whole protocol on a table of logits, in closed form. For tests of training loops, and of backends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

from torch import Tensor

from ..base import Backend
from ..engine import Call
from .engine import FakeEngine

__all__ = ["Call", "FakeBackend"]


@final
class FakeBackend(Backend):
    """A trainer without a model: exact, instant, deterministic, and it writes down what was asked of it.

    The log-prob of a token depends on the token before it alone, by a table of logits. All rules of a backend hold (order,
    accumulation, normalisation, validation, errors), and gradient and step are closed forms that use no autograd: what
    another backend should do can be compared with it.

    Args:
        vocab_size: V.
        seed: of the table and of sampling.
        faults: an error to raise in place of an operation, by its number from 1, e.g. ``{3: TimeoutError("lost")}``.
        stop: token ids that end a sampled completion.
    """

    def __init__(
        self,
        vocab_size: int = 17,
        *,
        seed: int = 0,
        faults: Mapping[int, Exception] | None = None,
        stop: Sequence[int] = (),
    ) -> None:
        self._fake = FakeEngine(vocab_size, seed, stop, faults or {})
        super().__init__(self._fake)

    @property
    def calls(self) -> list[Call]:
        """Every operation, in order."""
        return self._fake.calls

    @property
    def vocab_size(self) -> int:
        """V."""
        return self._fake.model.logits.shape[0]

    @property
    def table(self) -> Tensor:
        """A copy of the logits by previous token, fp64 [V, V]."""
        return self._fake.model.logits.clone()
