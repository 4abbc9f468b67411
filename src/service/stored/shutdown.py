"""What becomes of the models in memory when the server ends: each is saved as a checkpoint that a client can load."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, final

from ...errors import PullbackError
from ..durability.journal import Journal
from ..served.registry import ServedModels
from .saving import Save, save

__all__ = ["ShutdownSaver"]

_NAME: Final = "shutdown-%Y%m%dT%H%M%SZ"


@final
class ShutdownSaver:
    """Saves what is in memory, and says in words which models are saved and which are not.

    Args:
        models: the models that are served; nothing else uses them any more.
        journal: names the checkpoints to those who ask after the next start.
        seconds: to do it in; a model whose saving would probably take longer is not begun.
        clock: seconds.
    """

    def __init__(
        self, models: ServedModels, journal: Journal, seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._models, self._journal, self._clock = models, journal, clock
        self._end, self._seconds, self._longest = clock() + seconds, seconds, 0.0

    def save_all(self) -> list[str]:
        """Save every model that has changed since its last checkpoint; return a sentence for each."""
        return [self._saved(model) for model in list(self._models.backends) if self._has_changed(model)]

    def lost(self, why: str) -> list[str]:
        """Save nothing; return a sentence for each changed model, which is lost."""
        return [self._lost(model, why) for model in list(self._models.backends) if self._has_changed(model)]

    def _has_changed(self, model: str) -> bool:
        if self._models.choices[model].base_only:
            return False
        newest, number = self._journal.newest_checkpoint(model, "weights"), self._journal.last_number(model)
        return number > (0 if newest is None else newest["number"])

    def _saved(self, model: str) -> str:
        began = self._clock()
        if began + self._longest > self._end:
            return self._lost(model, f"the {self._seconds:g} s for it have passed")
        row, name = self._journal.model(model), time.strftime(_NAME, time.gmtime())
        try:
            owner = "" if row is None else row["owner"]
            uri = save(
                self._models, self._journal, Save(owner, model, "weights", self._journal.last_number(model), name)
            )
        except (PullbackError, OSError) as error:
            return self._lost(model, str(error))
        self._longest = max(self._longest, self._clock() - began)
        return f"{model} is saved as {uri}"

    def _lost(self, model: str, why: str) -> str:
        last = self._journal.last_checkpoint(model)
        return f"{model} is not saved ({why}); its last checkpoint: {last or 'none'}"
