"""A process that does what the first one tells it to."""

from __future__ import annotations

import logging
import signal
from collections.abc import Mapping, Sequence
from typing import Any, final

from ...backends.native.execution.retained import RetainedForward
from ...errors import LostRankError
from .channel import STOP, Command, ForwardHandles
from .member import Member

__all__ = ["Follower", "follow"]

_logger = logging.getLogger(__name__)


@final
class Follower:
    """Makes every call that the first process makes, in the same order.

    Args:
        member: this process.
    """

    def __init__(self, member: Member) -> None:
        self._member = member
        self._retained: dict[int, RetainedForward] = {}

    def run(self) -> None:
        """Follow until the first process says that it ends.

        Raises:
            LostRankError: another process is gone, or does not answer.
        """
        while True:
            command = self._next()
            if command == STOP:
                return
            try:
                self._make(command)
            except LostRankError:
                raise
            except Exception as error:  # it has failed on every process; the first one answers for it
                _logger.info("%s failed: %s", command.title, error)

    def _next(self) -> Command:
        try:
            raw = self._member.channel.receive()
        except RuntimeError as error:
            raise LostRankError(f"the first process has stopped: {error}") from error
        return Command.of(raw)

    def _make(self, command: Command) -> None:
        for number in command.dropped:
            self._retained.pop(number, None)
        result = self._member.make(command, lambda: self._arguments(command))
        if command.name == "forward_retain" and result.exception() is None:
            self._retained[command.handle] = result.result()

    def _arguments(self, command: Command) -> tuple[Sequence[Any], Mapping[str, Any]]:
        return [self._own(value) for value in command.args], command.kwargs

    def _own(self, value: Any) -> Any:
        if not isinstance(value, ForwardHandles):
            return value
        return {self._retained[number]: at for number, at in value.places.items()}


def follow(member: Member) -> None:
    """Follow the first process to its end, whatever signals this one is sent: it ends after the last call of the first."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    Follower(member).run()
