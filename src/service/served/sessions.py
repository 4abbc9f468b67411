"""Sessions: whose they are, whose models they have, and when they were last heard of."""

from __future__ import annotations

import time
from typing import Any, Final, final

from ...backends.native.models.lora import LoraChoice
from ..durability.journal import Journal
from ..durability.recovery import lost
from ..queueing.sequencer import Sequencer
from .owned import own_model, own_session

__all__ = ["Sessions"]

_KNOWN_SECONDS: Final = 24 * 3600.0


@final
class Sessions:
    """Who may do what; a model of another owner does not exist.

    Args:
        journal: knows every session and model, also those of an earlier process.
        sequencer: is told of models that did not live on.
    """

    def __init__(self, journal: Journal, sequencer: Sequencer) -> None:
        self._journal, self._sequencer = journal, sequencer
        self._seen: dict[str, float] = {}
        self._started = time.time()

    def require_model(self, owner: str, model_id: str) -> None:
        """Check that a model is this owner's; if it is not in memory any more, let its operations fail and say why.

        Raises:
            NotFoundError: there is none, or it is another's (which is the same).
        """
        row = own_model(self._journal, owner, model_id)
        self._seen[row["session"]] = time.monotonic()
        if not self._sequencer.knows(model_id):
            before = row["created"] < self._started
            self._sequencer.end(model_id, lost(self._journal, model_id) if before else self._ended(model_id))

    def require(self, owner: str, session: Any) -> str:
        """Return a session's id.

        Raises:
            NotFoundError: there is none, or it is another's.
        """
        row = own_session(self._journal, owner, session)
        known: str = row["id"]
        self._seen[known] = time.monotonic()
        if row["ended"] is not None:  # by a process before this one, or long ago
            self._sequencer.end(known, f"the session {known} was finished by its client; create another one")
        return known

    def lora_of(self, owner: str, model_id: str) -> LoraChoice:
        """Return a model's adapter choice, also after a restart.

        Raises:
            NotFoundError: there is no such model, or it is another's.
        """
        return LoraChoice.from_json(own_model(self._journal, owner, model_id)["lora"])

    def silent(self, session: str, seconds: float) -> bool:
        """Whether nothing was heard of a session for so long."""
        return self._seen.get(session, 0.0) < time.monotonic() - seconds

    def heard_of(self, seconds: float) -> set[str]:
        """Return the sessions of which something was heard in the last so many seconds."""
        since = time.monotonic() - seconds
        return {session for session, moment in list(self._seen.items()) if moment >= since}

    def forget(self, session: str) -> None:
        """Drop what is known of a session that has ended."""
        self._seen.pop(session, None)

    def silent_ones(self, seconds: float) -> list[str]:
        """Return the sessions of which nothing was heard for so long; after a day of silence they are no longer known."""
        silent = [session for session in list(self._seen) if self.silent(session, seconds)]
        for session in silent:
            if self.silent(session, _KNOWN_SECONDS):
                self._seen.pop(session, None)
        return silent

    def _ended(self, model_id: str) -> str:
        last = self._journal.last_checkpoint(model_id) or "none"
        return (
            f"{model_id} is no longer in memory: it was unloaded, or its session has ended; its last checkpoint: {last}"
        )
