"""One process among those that train the models of a service."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, final

from torch.distributed.device_mesh import DeviceMesh

from ...backends.native.distributed.agreement.agreement import Agreement
from ...backends.native.distributed.ranks import Ranks
from ...backends.operations.futures import FinishedFuture
from ...errors import LostRankError
from ..served.registry import Base, ServedModels
from .channel import Channel, Command

__all__ = ["MODELS", "Member", "spread"]

MODELS: Final = ("create", "release", "load")  # methods of `ServedModels`; all others are a backend's


def spread(base: Base, mesh: DeviceMesh, timeout: float | None) -> Base:
    """Return a base whose adapters are trained by all processes of a mesh; each process keeps the base itself whole.

    Args:
        base: the same on every process.
        mesh: of the processes.
        timeout: seconds that a process waits for the others in the middle of a call; None: PyTorch's default.
    """
    options = {"mesh": mesh, "reshard": False, "shard_frozen": False, "timeout": timeout}
    return replace(base, options={**base.options, **options})


@final
class Member:
    """This process's copy of the models, and the meetings at which all processes agree on what became of a call.

    Args:
        models: that are served; those of every process have the same base and see the same folder.
        mesh: of the processes.
        timeout: seconds that a process waits for the others in a call, and the first one until they take it; None: PyTorch's
            default.
    """

    def __init__(self, models: ServedModels, mesh: DeviceMesh, timeout: float | None) -> None:
        self.models, self.channel = models, Channel(mesh, timeout)
        self._ranks = Ranks.of(mesh, timeout)
        self._agreement = Agreement(self._ranks)

    @property
    def first(self) -> bool:
        """Whether this is the process that speaks HTTP."""
        return self._ranks.rank == 0

    def make(self, command: Command, begin: Callable[[], tuple[Sequence[Any], Mapping[str, Any]]]) -> Any:
        """Make one call together with all other processes; return this one's result.

        A call that has failed on any process has failed on all, and has changed nothing.

        Args:
            command: the call.
            begin: is called first, and returns its arguments.

        Raises:
            RankFailedError: it failed elsewhere.
            RanksDifferError: another process has made another call, or has other models.
            LostRankError: another process does not answer.
        """
        outcome = ["failed"]
        try:
            with self._agreement.concluding(command.title, lambda: f"{outcome[0]}, {self._state(command.model)}"):
                args, kwargs = begin()
                result = self._call(command, args, kwargs)
                outcome[0] = _outcome(result)
        except BaseException:
            if command.name == "create":
                self.models.release(command.model)
            raise
        return result

    def _call(self, command: Command, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if command.name in MODELS:
            return getattr(self.models, command.name)(command.model, *args, **kwargs)
        return getattr(self.models.backends[command.model], command.name)(*args, **kwargs)

    def _state(self, model: str) -> str:
        backend = self.models.backends.get(model)
        version = "" if backend is None else f" at step {backend.weights_version}"
        others = hashlib.sha256("".join(sorted(self.models.backends)).encode()).hexdigest()[:8]  # not named to a client
        return f"{model}{version}, one of {len(self.models.backends)} models ({others})"


def _outcome(result: Any) -> str:
    """Say whether an operation has succeeded, and retrieve its error as the service does on the first process.

    Raises:
        LostRankError: another process does not answer.
    """
    error = result.exception() if isinstance(result, FinishedFuture) else None
    if isinstance(error, LostRankError):
        raise error
    return "done" if error is None else "failed"
