"""A backend under test: how to make it, and how to compare two updates without reading weights."""

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

__all__ = ["BackendUnderTest"]

_PARAMS: Final = AdamParams(learning_rate=1e-2, eps=1e-6)


@final
@dataclass(frozen=True)
class BackendUnderTest:
    """A backend that `check_backend` examines.

    Args:
        make: returns a fresh backend, the same each time.
        vocab_size: token ids are below it.
        tolerance: largest difference of two updates that should be equal, relative to the update (log-probs travel in fp32).
        lengths: of the datums, tokens; an even number of them.
        params: of a step; eps is so large that rounding errors do not decide the direction of the step.
    """

    make: Callable[[], TrainerBackend]
    vocab_size: int = 17
    tolerance: float = 1e-3
    lengths: Sequence[int] = (5, 3, 7, 4, 6, 2)
    params: AdamParams = _PARAMS

    def data(self, seed: int = 0) -> list[Datum]:
        """Return training data."""
        return example_datums(self.lengths, seed, self.vocab_size)

    def probe(self, backend: TrainerBackend) -> Tensor:
        """Return the log-probs of data that is never trained on, fp64 [N]."""
        outputs = backend.forward(self.data(seed=1)).result().loss_fn_outputs
        return torch.cat([output["logprobs"].to_torch().double() for output in outputs])

    @contextmanager
    def backend(self) -> Iterator[TrainerBackend]:
        """Yield a fresh backend and close it at the end."""
        backend = self.make()
        yield backend
        with suppress(UnsupportedError):  # some services cannot discard gradients
            backend.discard_gradients()
        backend.close()

    def after(self, script: Callable[[TrainerBackend], object]) -> Tensor:
        """Run a script on a fresh backend and return the probe of it."""
        with self.backend() as backend:
            script(backend)
            return self.probe(backend)

    def require_same(self, what: str, expected: Tensor, actual: Tensor) -> None:
        """Check that two probes show the same update.

        Raises:
            AssertionError: the updates differ, or nothing was updated.
        """
        start = self.after(lambda _: None)
        size, difference = float((expected - start).norm()), float((expected - actual).norm())
        assert size > 0, f"{what}: nothing was updated"
        assert difference <= self.tolerance * size, (
            f"{what}: the updates differ by {difference / size:.2e} of their size"
        )
