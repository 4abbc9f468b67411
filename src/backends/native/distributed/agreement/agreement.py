"""What the ranks agree on: that all of them do the same, with the same data, and that nothing has failed on any."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, TypeVar, final

import torch
import torch.distributed as dist

from .....errors import LostRankError, RankError, RankFailedError, RanksDifferError
from ...execution.memory import is_out_of_memory
from ..ranks import Ranks
from .message import FINE, OUT_OF_MEMORY, Message

__all__ = ["Agreement"]

T = TypeVar("T")
_START_AGAIN: Final = "Start all processes again and load the last checkpoint"


class _OutOfMemoryEverywhere(torch.OutOfMemoryError):
    """Every rank raises this where one has run out of memory, so that all may try again."""


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
        outer = self._running, self._over
        self._running, self._over = f"{outer[0]} > {name}" if outer[0] else name, False
        try:
            self.require_whole()
            yield
            self.meet("end")
        except BaseException as error:
            if _comes_from_the_group(error):
                raise self._losing(error) from error
            if not self._over and self._lost is None:
                self._report(error)
            raise
        finally:
            self._running, self._over = outer

    @contextmanager
    def concluding(self, name: str, state: Callable[[], str]) -> Iterator[None]:
        """Run work that has operations of these ranks in it; at its end all meet, however far each of them has come.

        A rank that has failed before, between or without operations is waited for in one of them, or here: both are met.

        Args:
            name: of the work.
            state: says what the work has left, which must be the same everywhere.

        Raises:
            RankFailedError: it failed elsewhere.
            RanksDifferError: it has left something else there.
            LostRankError: another rank does not answer.
        """
        self._running, own = name, None
        self.require_whole()
        try:
            yield
        except BaseException as error:
            if isinstance(error, LostRankError) or _comes_from_the_group(error):
                raise self._losing(error) from error
            own = error
        stage = f"{name}: conclusion"
        message = Message(FINE, stage, text=state()) if own is None else Message.of_failure(own, stage, state())
        said = self._exchange(message)
        while any(each.stage != said[self._ranks.rank].stage for each in said):
            said = self._exchange(message)  # those who were in an operation have ended it now
        if own is not None:
            raise own
        self._require_concluded(said)

    def _require_concluded(self, said: list[Message]) -> None:
        for rank, message in enumerate(said):
            if message.failed:
                raise RankFailedError(f"{self._running} failed on rank {rank}: {message.error}", message.refusal)
            if message.text != said[0].text:
                raise RanksDifferError(
                    f"{self._running} has ended otherwise on rank {rank} than on rank 0: {message.text!r} instead of "
                    f"{said[0].text!r}"
                )

    def require_whole(self) -> None:
        """Check that no rank has been lost.

        Raises:
            LostRankError: one has.
        """
        if self._lost is not None:
            raise LostRankError(
                f"{self._running} cannot run: the processes have lost each other in an earlier operation "
                f"({_first_line(self._lost)}). {_START_AGAIN}"
            ) from self._lost

    @contextmanager
    def together(self, stage: str) -> Iterator[None]:
        """Do work in the middle of which ranks wait for each other, so that one that fails there leaves the others behind.

        Raises:
            LostRankError: another rank did not come, or memory ran out here, which cannot be tried again.
        """
        try:
            yield
        except BaseException as error:
            if self._over or isinstance(error, (RankError, _OutOfMemoryEverywhere)):
                raise  # at a meeting
            if _comes_from_the_group(error):
                raise self._losing(error) from error
            self._lost = self._lost or error
            if isinstance(error, RuntimeError) and is_out_of_memory(error):
                raise LostRankError(
                    f"{self._running}: {stage}: memory ran out in the middle of what all processes do together, so that the "
                    f"others wait and it cannot be tried again ({_first_line(error)}). {_START_AGAIN}, with a smaller "
                    "token_budget, or with reshard=False if whole weights and gradients fit"
                ) from error
            raise

    def attempt(self, stage: str, work: Callable[[], T]) -> T:
        """Do work that needs no other rank, then meet: it has succeeded only if it has everywhere.

        Raises:
            torch.OutOfMemoryError: some rank ran out of memory; every rank raises it, and may retry.
        """
        try:
            done = work()
        except BaseException as error:
            if self._lost is None and not _comes_from_the_group(error):
                if isinstance(error, RuntimeError) and is_out_of_memory(error):
                    self.meet(stage, outcome=OUT_OF_MEMORY)
                self._report(error)
            raise
        self.meet(stage)
        return done

    def meet(
        self,
        stage: str,
        *digests: bytes,
        text: str = "",
        text_is: str = "",
        names: Sequence[str] = (),
        outcome: int = FINE,
        undone: bool = True,
    ) -> None:
        """Wait for every rank, and compare.

        Args:
            stage: of the operation.
            digests: of what must be the same on every rank, one a datum, or one in all.
            text, text_is: that must be the same too, shown by the error, and what it is.
            names: of what the digests are of, where it is not datums.
            outcome: how this rank fares.
            undone: nothing has changed if a rank has failed.

        Raises:
            RankFailedError: a rank has failed.
            RanksDifferError: ranks are at different places, or have been given different things.
            LostRankError: a rank does not answer in time.
        """
        where = f"{self._running}: {stage}"
        together = hashlib.sha256(b"".join(digests)).digest() if digests else b""
        said = self._exchange(Message(outcome, where, together, text))
        for rank, message in enumerate(said):
            if message.failed:
                self._over = True
                after = (
                    "nothing has changed on any rank" if undone else "other ranks have changed their weights already"
                )
                words = f"{self._running} failed on rank {rank} ({after}): {message.error}"
                raise RankFailedError(words, message.refusal if undone else None)
        others = [rank for rank, message in enumerate(said) if message.stage != said[0].stage]
        if others:
            self._over = True
            raise RanksDifferError(
                f"rank 0 is at {said[0].stage!r}, rank {others[0]} at {said[others[0]].stage!r}; every rank must run the same "
                "script, with the same operations in the same order"
            )
        if any(message.outcome == OUT_OF_MEMORY for message in said):
            rank = next(r for r, message in enumerate(said) if message.outcome == OUT_OF_MEMORY)
            raise _OutOfMemoryEverywhere(f"rank {rank} ran out of memory in {where}")
        self._require_equal(stage, text_is, said, digests, names)

    def _require_equal(
        self, stage: str, text_is: str, said: list[Message], digests: tuple[bytes, ...], names: Sequence[str]
    ) -> None:
        first = said[0]
        others = [r for r, each in enumerate(said) if (each.digest, each.text) != (first.digest, first.text)]
        if not others:
            return
        self._over = True
        if said[others[0]].text != first.text:
            stage = text_is or stage
            differing = f"{said[others[0]].text!r} instead of {first.text!r}"
        else:
            differing = self._differing(others[0], digests, names)
        raise RanksDifferError(
            f"{self._running}: rank {others[0]} was given another {stage} than rank 0{differing and f': {differing}'}. Every "
            "rank must be given the same global batch and the same settings; seed what is drawn, or draw it on rank 0 and "
            "broadcast it"
        )

    def _differing(self, rank: int, digests: tuple[bytes, ...], names: Sequence[str]) -> str:
        """Return which of its digests differ from rank 0's; every rank asks."""
        counts = self._ranks.gather(torch.tensor([len(digests)])).flatten().tolist()
        if counts[rank] != counts[0]:
            return f"{counts[rank]} of them instead of {counts[0]}"
        if (len(digests) == 1 and not names) or len(set(counts)) > 1:
            return ""
        every = self._ranks.gather(torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8))
        rows = every.reshape(len(every), len(digests), -1)
        differing = (rows[rank] != rows[0]).any(-1).nonzero().flatten().tolist()
        first = names[differing[0]] if names else f"datum {differing[0]}"
        return f"{first} differs" + (f" ({len(differing)} in all)" if len(differing) > 1 else "")

    def _report(self, error: BaseException) -> None:
        """Tell the others, wherever they wait, that this rank has failed."""
        self._over = True
        self._exchange(Message.of_failure(error, self._running))

    def _exchange(self, message: Message) -> list[Message]:
        try:
            return [Message.of(row) for row in self._ranks.gather(message.to_tensor())]
        except RuntimeError as error:
            raise self._losing(error) from error

    def _losing(self, error: BaseException) -> LostRankError:
        """Take note that a rank is lost, and return what says so."""
        self._lost = self._lost or error
        return LostRankError(
            f"{self._running}: another process has stopped, or did not answer in time ({_first_line(error)}). {_START_AGAIN}"
        )


def _first_line(error: BaseException) -> str:
    lines = re.sub(r"^\[\S+:\d+\] ", "", str(error).strip()).splitlines()  # without gloo's own source file
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__


def _comes_from_the_group(error: BaseException) -> bool:
    """Whether an error says that another process did not come, and not that something is wrong here."""
    if isinstance(error, RankError) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)
