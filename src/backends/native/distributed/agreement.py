"""What the ranks agree on: that all of them do the same, with the same data, and that nothing has failed on any."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, TypeVar, final

import torch
from torch import Tensor

from ....errors import LostRankError, RankFailedError, RanksDifferError
from ..execution.memory import ran_out
from .ranks import Ranks

__all__ = ["Agreement"]

T = TypeVar("T")
_TEXT: Final = 1024  # bytes of a message
_FINE, _OUT_OF_MEMORY, _FAILED = range(3)


@final
@dataclass(frozen=True)
class _Message:
    """What one rank says when all of them meet.

    Attributes:
        outcome: of the work since they last met.
        stage: where this rank is.
        digest: of what must be the same everywhere.
        error: why the work has failed.
    """

    outcome: int
    stage: str
    digest: bytes = b""
    error: str = ""

    def to_tensor(self) -> Tensor:
        """Return uint8 [3 x _TEXT + 1]."""
        texts = [_padded(self.stage.encode()), _padded(self.digest), _padded(self.error.encode())]
        return torch.frombuffer(bytearray(bytes([self.outcome]) + b"".join(texts)), dtype=torch.uint8)

    @classmethod
    def of(cls, tensor: Tensor) -> _Message:
        """Read what `to_tensor` wrote."""
        raw = bytes(tensor.tolist())
        stage, digest, error = (raw[1 + i * _TEXT : 1 + (i + 1) * _TEXT].rstrip(b"\0") for i in range(3))
        return cls(raw[0], stage.decode(errors="ignore"), digest, error.decode(errors="ignore"))


@final
class Agreement:
    """Meetings of all ranks, at which each says where it is and how it fares.

    Every operation ends with one, and has more before each act that cannot be undone. A failure that any rank reports
    ends the operation on every rank. Where a rank does not come at all, the process group is of no more use.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._lost: BaseException | None = None
        self._running = ""
        self._over = True

    @contextmanager
    def operation(self, name: str) -> Iterator[None]:
        """Run one operation, whose failure on one rank is every rank's.

        Raises:
            RankFailedError: it failed elsewhere.
            RanksDifferError: another rank runs another operation.
            LostRankError: another rank does not answer.
        """
        self.require_whole()
        outer = self._running, self._over
        self._running, self._over = f"{outer[0]} > {name}" if outer[0] else name, False
        try:
            yield
            self.meet("end")
        except BaseException as error:
            if not self._over and self._lost is None:
                self._report(error)
            raise
        finally:
            self._running, self._over = outer

    def require_whole(self) -> None:
        """Check that no rank has been lost.

        Raises:
            LostRankError: one has.
        """
        if self._lost is not None:
            raise LostRankError(_lost_words(self._running, self._lost)) from self._lost

    def give_up(self, error: BaseException) -> None:
        """Take note that the ranks are no longer at the same place: nothing can be asked of the group any more."""
        self._lost = self._lost or error

    def attempt(self, stage: str, work: Callable[[], T]) -> T:
        """Do work that needs no other rank, then meet: it has succeeded only if it has everywhere.

        Raises:
            torch.OutOfMemoryError: some rank ran out of memory; every rank raises it, and may retry.
        """
        try:
            done = work()
        except RuntimeError as error:
            if ran_out(error):
                self.meet(stage, outcome=_OUT_OF_MEMORY)
            raise
        self.meet(stage)
        return done

    def meet(self, stage: str, *digests: bytes, outcome: int = _FINE) -> None:
        """Wait for every rank, and compare.

        Args:
            stage: of the operation.
            digests: of what must be the same on every rank, one a datum, or one in all.
            outcome: how this rank fares.

        Raises:
            RankFailedError: a rank has failed.
            RanksDifferError: ranks are at different places, or have been given different things.
            LostRankError: a rank does not answer in time.
        """
        where = f"{self._running}: {stage}"
        together = hashlib.sha256(b"".join(digests)).digest() if digests else b""
        said = self._exchange(_Message(outcome, where, together))
        for rank, message in enumerate(said):
            if message.outcome == _FAILED:
                self._over = True
                raise RankFailedError(
                    f"{self._running} failed on rank {rank}, so that nothing has changed on any: {message.error}"
                )
        others = [rank for rank, message in enumerate(said) if message.stage != said[0].stage]
        if others:
            self._over = True
            raise RanksDifferError(
                f"rank 0 is at {said[0].stage!r}, rank {others[0]} at {said[others[0]].stage!r}; every rank must run the same "
                "script, with the same operations in the same order"
            )
        if any(message.outcome == _OUT_OF_MEMORY for message in said):
            rank = next(r for r, message in enumerate(said) if message.outcome == _OUT_OF_MEMORY)
            raise torch.OutOfMemoryError(f"rank {rank} ran out of memory in {where}")
        self._require_equal(stage, [message.digest for message in said], digests)

    def _require_equal(self, stage: str, together: list[bytes], digests: tuple[bytes, ...]) -> None:
        others = [rank for rank, digest in enumerate(together) if digest != together[0]]
        if not others:
            return
        self._over = True
        counts = self._ranks.gather(torch.tensor([len(digests)])).flatten().tolist()
        words = f"rank {others[0]} was given another {stage} than rank 0"
        if len(set(counts)) > 1:
            words += f": {counts[others[0]]} parts instead of {counts[0]}"
        elif len(digests) > 1:
            every = self._ranks.gather(torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8))
            rows = every.reshape(len(every), len(digests), -1)
            differing = (rows[others[0]] != rows[0]).any(-1).nonzero().flatten().tolist()
            words += f": datum {differing[0]} differs" + (f" ({len(differing)} in all)" if len(differing) > 1 else "")
        raise RanksDifferError(
            f"{self._running}: {words}. Every rank must be given the same global batch and the same settings; seed what is "
            "drawn, or draw it on rank 0 and broadcast it"
        )

    def _report(self, error: BaseException) -> None:
        """Tell the others, wherever they wait, that this rank has failed."""
        self._over = True
        words = f"{type(error).__name__}: {error}"
        self._exchange(_Message(_FAILED, self._running, error=words))

    def _exchange(self, message: _Message) -> list[_Message]:
        try:
            return [_Message.of(row) for row in self._ranks.gather(message.to_tensor())]
        except RuntimeError as error:
            self._lost = error
            raise LostRankError(_lost_words(message.stage, error)) from error


def _padded(text: bytes) -> bytes:
    return text[:_TEXT].ljust(_TEXT, b"\0")


def _lost_words(where: str, error: BaseException) -> str:
    reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    return (
        f"{where}: another rank has stopped, or did not answer in time ({reason}); the gradients of this operation have not "
        "been added anywhere. Start all processes again and load the last checkpoint"
    )
