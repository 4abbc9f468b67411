"""A backend under examination: how to make it, and how to tell two of it apart without looking at weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from ..backends.protocol import TrainerBackend
from ..backends.types import AdamParams
from ..datums.types import Datum
from ..errors import UnsupportedError
from .examples import example_datums

__all__ = ["Subject"]

_PARAMS: Final = AdamParams(learning_rate=1e-2, eps=1e-6)


@final
@dataclass(frozen=True)
class Subject:
    """What is examined.

    Args:
        make: returns a fresh backend, the same each time.
        vocab_size: token ids are below it.
        tolerance: of two ways to one update, relative to the update (log-probs travel in fp32).
        lengths: of the datums, tokens; an even number.
        params: of a step; eps is large enough that rounding does not decide its direction.
    """

    make: Callable[[], TrainerBackend]
    vocab_size: int = 17
    tolerance: float = 1e-3
    lengths: Sequence[int] = (5, 3, 7, 4, 6, 2)
    params: AdamParams = _PARAMS

    def data(self, seed: int = 0) -> list[Datum]:
        """Training data."""
        return example_datums(self.lengths, seed, self.vocab_size)

    def probe(self, backend: TrainerBackend) -> Tensor:
        """Log-probs of data that is never trained on, fp64 [N]."""
        outputs = backend.forward(self.data(seed=1)).result().loss_fn_outputs
        return torch.cat([one["logprobs"].to_torch().double() for one in outputs])

    @contextmanager
    def backend(self) -> Iterator[TrainerBackend]:
        """A fresh backend, closed at the end."""
        made = self.make()
        yield made
        with suppress(UnsupportedError):  # a service may not be able to forget
            made.discard_gradients()
        made.close()

    def after(self, script: Callable[[TrainerBackend], object]) -> Tensor:
        """The probe of a fresh backend after a script."""
        with self.backend() as backend:
            script(backend)
            return self.probe(backend)

    def require_same(self, what: str, one: Tensor, other: Tensor) -> None:
        """Check that two updates are one, measured against their size.

        Raises:
            AssertionError: they are not, or there was none.
        """
        start = self.after(lambda _: None)
        size, difference = float((one - start).norm()), float((one - other).norm())
        assert size > 0, f"{what}: nothing was updated"
        assert difference <= self.tolerance * size, (
            f"{what}: the updates differ by {difference / size:.2e} of their size"
        )
