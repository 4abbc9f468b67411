"""A backend under test: how to make it, and how to compare two updates without reading weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar, final

import torch
from torch import Tensor

from ..backends.protocol import TrainerBackend
from ..backends.types import AdamParams
from ..datums.types import Datum
from ..errors import UnsupportedError
from .examples import example_datums

__all__ = ["BackendUnderTest", "Mismatch"]

B = TypeVar("B", bound=TrainerBackend)
_PARAMS: Final = AdamParams(learning_rate=1e-2, eps=1e-6)
_RECOGNISED: Final = 0.03  # how near to a known factor a factor is recognised


@final
class Mismatch(AssertionError):
    """Two updates that should be equal are not.

    Attributes:
        cause: what the pattern of the difference says; may be empty.
    """

    def __init__(self, sentence: str, cause: str = "") -> None:
        super().__init__(sentence)
        self.cause = cause


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
        nats: largest difference of two log-probs that should be equal.
        name: for reports.
        facts: for reports: versions, address, device.
        seeded: returns a fresh backend whose weights begin as a seed says; None: there is no such choice.
        unreliable: a fresh backend on a network that loses answers and delivers requests twice; None: there is no network.
        reference: returns a backend that is right, with the same weights, to compare with; None: there is none.
        reference_trains: the reference trains the same parameters from the same start, and does not only score.
        variants: the same backend in several dtypes, by name, for the table of precision.
        incomparable: why the updates of two fresh backends cannot be compared; empty where they can.
    """

    make: Callable[[], TrainerBackend]
    vocab_size: int = 17
    tolerance: float = 1e-3
    lengths: Sequence[int] = (5, 3, 7, 4, 6, 2)
    params: AdamParams = _PARAMS
    nats: float = 1e-4
    name: str = "backend"
    facts: Mapping[str, str] = field(default_factory=dict)
    seeded: Callable[[int], TrainerBackend] | None = None
    unreliable: Callable[[], AbstractContextManager[TrainerBackend]] | None = None
    reference: Callable[[], TrainerBackend] | None = None
    reference_trains: bool = False
    variants: Mapping[str, Callable[[], TrainerBackend]] = field(default_factory=dict)
    incomparable: str = ""
    _measured: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

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
        with closing(self.make()) as backend:
            yield backend

    def after(self, script: Callable[[TrainerBackend], object]) -> Tensor:
        """Run a script on a fresh backend and return the probe of it."""
        with self.backend() as backend:
            script(backend)
            return self.probe(backend)

    def start(self) -> Tensor:
        """Return the probe of a fresh backend, asked for once."""
        found: Tensor = self.once("start", lambda: self.after(lambda _: None))
        return found

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        """Return what a measurement gives, which is made once."""
        if name not in self._measured:
            self._measured[name] = measure()
        return self._measured[name]

    def require_same(self, what: str, expected: Tensor, actual: Tensor) -> float:
        """Check that two probes show the same update.

        Returns:
            Their difference, relative to the update.

        Raises:
            Mismatch: the updates differ, or nothing was updated.
            UnsupportedError: the updates of two fresh backends cannot be compared here.
        """
        if self.incomparable:
            raise UnsupportedError(self.incomparable)
        start = self.start()
        size, difference = float((expected - start).norm()), float((expected - actual).norm())
        if not size > 0:
            raise Mismatch(f"{what}: nothing was updated")
        if not difference <= self.tolerance * size:
            sentence = f"{what}: the updates differ by {difference / size:.2e} of their size"
            raise Mismatch(sentence, self._likely(expected - start, actual - start))
        return difference / size

    def _likely(self, expected: Tensor, actual: Tensor) -> str:
        """Say what the difference of two updates looks like, if it looks like anything."""
        if not bool(actual.isfinite().all()):
            return "NaN or inf in the gradient or the step"
        if float(actual.norm()) <= self.tolerance * float(expected.norm()):
            return "the gradient was lost: there is no update at all"
        factor = float(actual @ expected / (expected @ expected))
        if float((actual - factor * expected).norm()) > 0.1 * float(actual.norm()) or abs(factor - 1) < _RECOGNISED:
            return ""
        return f"the update is {factor:.4g} times what it should be{self.factor_in_words(factor)}"

    def factor_in_words(self, factor: float) -> str:
        """Say which count of the example data a factor is, or nothing."""
        data = self.data()
        trained = sum(int((d.loss_fn_inputs["weights"].to_torch() != 0).sum()) for d in data)
        counts = {
            trained: "the number of trained tokens",
            sum(self.lengths): "the number of all tokens",
            len(data): "the number of sequences",
            len(data) // 2: "the number of pairs",
        }
        for known, words in ((-1.0, ": the sign is lost"), (2.0, ": something is applied twice"), (0.5, ", one half")):
            if abs(factor - known) < _RECOGNISED:
                return words
        for count, words in counts.items():
            if abs(factor * count - 1) < _RECOGNISED:
                return f", 1/{count}: divided by {words}"
            if abs(factor / count - 1) < _RECOGNISED:
                return f", {count}: multiplied by {words}"
        return ""


@contextmanager
def closing(backend: B) -> Iterator[B]:
    """Yield a backend and close it, whatever happens; only at a good end must closing succeed."""
    try:
        yield backend
    except BaseException:
        with suppress(Exception):
            backend.close()
        raise
    with suppress(UnsupportedError):  # some services cannot discard gradients
        backend.discard_gradients()
    backend.close()
