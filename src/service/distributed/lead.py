"""The first process: what the service asks of its models is done on every process."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final, cast, final

from ...backends import TorchBackend
from ...backends.native.execution.retained import RetainedForward
from ...backends.native.models.lora import LoraChoice
from ...errors import LostRankError
from ..served.registry import ServedModels
from ..served.sampler import Sampler
from .channel import STOP, Command, ForwardHandles
from .member import Member

__all__ = ["LOCAL", "TOGETHER", "Leader", "leading"]

_logger = logging.getLogger(__name__)
_LOST: Final = (
    "this server has lost one of its processes, or it did not answer in time, so the server must be started again"
)
# Methods of a backend that every process calls, and those that concern one process alone or are old spellings.
TOGETHER: Final = frozenset(
    (
        *("forward", "forward_backward", "forward_backward_custom", "forward_retain", "backward", "optim_step"),
        *("discard_gradients", "gradients", "gather_weights", "sample", "plan", "close"),
        *("save_state", "save_weights", "load_state", "load_state_with_optimizer", "export", "checkpoint_bytes"),
    )
)
LOCAL: Final = frozenset({"layouts", "from_pretrained", "reference", "hold", "pull"})


@final
class Leader:
    """Sends each call to the other processes and makes it here.

    Args:
        member: this process.

    Attributes:
        failure: why no further call can be made; None: all is well.
    """

    def __init__(self, member: Member) -> None:
        self._member, self._lock = member, threading.Lock()
        self.failure: str | None = None
        self._numbers = itertools.count(1)
        self._handles: weakref.WeakKeyDictionary[RetainedForward, int] = weakref.WeakKeyDictionary()
        self._dropped: deque[int] = deque()

    def call(self, name: str, model: str, *args: Any, **kwargs: Any) -> Any:
        """Make a call on every process; return this one's result.

        Raises:
            RankError: see `Member.make`.
        """
        with self._lock:
            command = self._command(name, model, args, kwargs)
            raw = self._packed(command)

            def begin() -> tuple[Sequence[Any], Mapping[str, Any]]:
                self._member.channel.send(raw)
                return args, kwargs

            try:
                result = self._member.make(command, begin)
            except LostRankError as error:
                _logger.error("%s", error)
                self.failure = _LOST
                raise LostRankError(
                    f"{name}: {_LOST}. The operation is not part of any checkpoint: go on from the last one"
                ) from error
            if name == "forward_retain" and result.exception() is None:
                self._keep(result.result(), command.handle)
            return result

    def stop(self) -> None:
        """Let the other processes end; those that have lost each other end by themselves, or would not listen."""
        with self._lock, contextlib.suppress(RuntimeError):  # those that are gone have ended
            if self.failure is None:
                self._member.channel.send(STOP.to_bytes())

    def _command(self, name: str, model: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Command:
        dropped = [self._dropped.popleft() for _ in range(len(self._dropped))]
        return Command(name, model, [self._sent(value) for value in args], kwargs, next(self._numbers), dropped)

    def _packed(self, command: Command) -> bytes:
        """Return what is sent; a call that cannot be sent fails here, before the other processes hear of it."""
        try:
            return command.to_bytes()
        except Exception:
            self._dropped.extend(command.dropped)  # they go with the next one
            raise

    def _sent(self, value: Any) -> Any:
        """Return an argument as the others read it: a retained forward by its number."""
        if isinstance(value, Mapping) and any(isinstance(key, RetainedForward) for key in value):
            return ForwardHandles({self._handles[key]: list(at) for key, at in value.items()})
        return value

    def _keep(self, retained: RetainedForward, number: int) -> None:
        """Let the others keep their part of a forward for as long as this one is in use."""
        self._handles[retained] = number
        weakref.finalize(retained, self._dropped.append, number)


@final
class _LeadingBackend:
    """A `TorchBackend` of the first process, whose operations run on every one."""

    def __init__(self, backend: TorchBackend, model: str, leader: Leader) -> None:
        self._backend, self._model, self._leader = backend, model, leader

    def __getattr__(self, name: str) -> Any:
        return partial(self._leader.call, name, self._model) if name in TOGETHER else getattr(self._backend, name)


@final
class _LeadingModels:
    """`ServedModels` of the first process: what is not here concerns this process alone."""

    def __init__(self, models: ServedModels, leader: Leader) -> None:
        self._models, self._leader = models, leader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._models, name)

    @property
    def failure(self) -> str | None:
        """See `ServedModels`."""
        return self._leader.failure

    def create(self, model_id: str, lora: LoraChoice, explicit: Iterable[str] = ()) -> None:
        """See `ServedModels.create`."""
        self._leader.call("create", model_id, lora, tuple(explicit))

    def release(self, model_id: str) -> None:
        """See `ServedModels.release`."""
        self._models.release(model_id)
        with contextlib.suppress(LostRankError):  # there is nothing left to release
            self._leader.call("release", model_id)

    def backend(self, model_id: str, *, scores_only: bool = False) -> Any:
        """See `ServedModels.backend`."""
        return _LeadingBackend(self._models.backend(model_id, scores_only=scores_only), model_id, self._leader)

    def save(self, *args: Any, **kwargs: Any) -> str:
        """See `ServedModels.save`: what a backend writes is written by all, the rest by this process."""
        return ServedModels.save(cast(ServedModels, self), *args, **kwargs)

    def load(
        self, model_id: str, uri: str, optimizer: bool, record: Callable[[LoraChoice], None] = lambda choice: None
    ) -> None:
        """See `ServedModels.load`; what all processes have loaded stays, though this one cannot record it."""
        self._models.backend(model_id)
        self._leader.call("load", model_id, uri, optimizer)
        record(self._models.choices[model_id])

    def sampler(self, model_id: str) -> Sampler:
        """See `ServedModels.sampler`; this process alone samples."""
        self.backend(model_id).gather_weights().result()
        return self._models.sampler(model_id)


@contextmanager
def leading(member: Member) -> Iterator[ServedModels]:
    """Yield models whose changes are made on every process; at the end the other processes end too.

    Args:
        member: the first process.
    """
    leader = Leader(member)
    try:
        yield cast(ServedModels, _LeadingModels(member.models, leader))
    finally:
        leader.stop()
