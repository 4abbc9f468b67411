"""Sampling at the service: its sessions, and their requests."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, final
from weakref import WeakValueDictionary

from ...backends.sampling import check_params
from ...datums.types import ModelInput
from ...errors import NotFoundError, ServiceError, TooLargeError
from ..durability.journal import Journal
from ..limits import Limits
from ..queueing.requirements import optional_number_of, require_number
from ..queueing.sequencer import Sequencer
from ..queueing.turns import Slices
from ..served.registry import ServedModels
from ..served.sampler import Sampler
from ..wire.protobuf import tokens_of
from ..wire.sampling import encode_sample
from .fair_cache import FairCache
from .sample_requests import RequestedScores, sampling_of

__all__ = ["Samplers"]

Json = dict[str, Any]
_USED = "the number of {} was used for another request; numbers go up by one"


@final
class Samplers:
    """Weights to sample from, by session; those from checkpoints are loaded when they are needed.

    Args:
        models: the models that are served.
        journal: knows every session, also those of an earlier process.
        sequencer: runs the sampling.
        limits: how many are kept in memory.
    """

    def __init__(self, models: ServedModels, journal: Journal, sequencer: Sequencer, limits: Limits) -> None:
        self._models, self._journal, self._sequencer, self._limits = models, journal, sequencer, limits
        self._loaded = FairCache[Sampler](limits.samplers, limits.samplers_per_key)
        self._shared: WeakValueDictionary[str, Sampler] = WeakValueDictionary()  # by what names their weights
        self._base = models.base.fingerprint
        self._ends: dict[str, float] = {}  # of those in memory that have a time to live

    def __len__(self) -> int:
        return len(self._loaded)

    def names(self) -> list[str]:
        """The sessions whose weights are in memory."""
        return self._loaded.names()

    def add(self, session: str, owner: str, sampler: Sampler, expires: float | None = None) -> None:
        """Open a session on weights in memory; of those who have too many, the one used longest ago goes.

        Args:
            session, owner: its id, and whose it is.
            sampler: the weights.
            expires: when its time to live ends, seconds of the epoch; None: never.
        """
        if self._journal.sampler(session) is not None:
            raise ServiceError(_USED.format(session))
        self._journal.add_sampler(session, owner, None, durable=False, expires=expires)
        self._loaded.add(session, owner, sampler)
        if expires is not None:
            self._ends[session] = expires

    def forget(self, session: str) -> None:
        """Let go of all weights that a session samples from."""
        self._loaded.forget(f"{session}:")

    def sweep(self) -> None:
        """Let go of weights whose time to live has passed."""
        now, held = self._models.checkpoints.clock(), set(self._loaded.names())
        for session in [session for session, ends in self._ends.items() if ends <= now]:
            self._loaded.drop(session)
        self._ends = {session: ends for session, ends in self._ends.items() if session in held and ends > now}

    def create(self, session: str, owner: str, body: Json) -> Json:
        """Open a session on a checkpoint, or on the base."""
        path, base, fingerprint = body.get("model_path"), self._models.base.name, self._base
        if path is not None:
            fingerprint = self._require_checkpoint(owner, path)
        elif body.get("base_model") != base:
            raise ServiceError(f"this server serves {base!r}, not {body.get('base_model')!r}")
        known = self._journal.sampler(session)
        if known is not None and (known["path"], known["durable"]) != (path, 1):
            raise ServiceError(_USED.format(session))
        if known is None:  # asked again, it is on the weights that it was made on
            self._journal.add_sampler(session, owner, path, durable=True, fingerprint=fingerprint)
        return {"type": "create_sampling_session", "sampling_session_id": session}

    def info(self, owner: str, session: str) -> Json:
        """What a session samples from."""
        row = self._row(owner, session)
        return {"sampler_id": session, "base_model": self._models.base.name, "model_path": row["path"]}

    def sample(self, owner: str, raw: bytes, body: Json) -> Json:
        """Sample completions of one prompt; with ``prompt_logprobs`` score it."""
        session, n = body["sampling_session_id"], require_number("num_samples", body.get("num_samples", 1))
        number = optional_number_of(body, "seq_id")
        self._row(owner, session)
        of = session.partition(":")[0]
        if (row := self._journal.session(of)) is not None and row["ended"] is not None:
            self._sequencer.end(of, f"the session {of} was finished by its client; create another one")
        queue = f"{session}:asample"

        def work() -> Slices:
            return self._slices(owner, session, n, body)

        request = self._sequencer.submit(owner, queue, number, raw, "sample", work, ordered=False)
        ids = [f"{session}:{0 if number is None else number}:{i}" for i in range(min(n, self._limits.samples))]
        return {"request_id": request, "sample_sequence_ids": ids}

    def _slices(self, owner: str, session: str, n: int, body: Json) -> Slices:
        """Compute the answer to a request for n completions."""
        if not 1 <= n <= self._limits.samples:
            raise TooLargeError(f"num_samples is {n}; this server samples 1 to {self._limits.samples}")
        prompt = ModelInput.from_ints(tokens_of(body["prompt"]))
        params, ends = sampling_of(body.get("sampling_params") or {}, self._models.base, prompt)
        if len(prompt) + params.max_tokens > self._limits.tokens:
            raise TooLargeError(
                f"max_tokens is {params.max_tokens}; this server takes at most {self._limits.tokens} tokens a text"
            )
        requested = RequestedScores.of(body, prompt, params.temperature)
        sampler = self._sampler(owner, session)
        check_params(params, sampler.vocab_size)
        requested.check(sampler.vocab_size, len(prompt), n * params.max_tokens)
        rollouts = yield from sampler.complete(prompt, n, params, ends, owner)
        scores = yield from requested.answer(sampler, prompt, rollouts)
        return encode_sample([(r.stop_reason, r.tokens, r.logprobs) for r in rollouts], scores)

    def _row(self, owner: str, session: Any) -> Json:
        row = self._journal.sampler(session) if isinstance(session, str) else None
        if row is None or row["owner"] != owner:
            raise NotFoundError(f"there is no sampling session {session!r} on this server{self._journal.caveat}")
        return row

    def _sampler(self, owner: str, session: str) -> Sampler:
        row = self._row(owner, session)
        if row["expires"] is not None and row["expires"] <= self._models.checkpoints.clock():
            moment = datetime.fromtimestamp(row["expires"], UTC).isoformat(timespec="seconds")
            raise ServiceError(
                f"the time to live of sampling session {session!r} ended at {moment}; make a new sampling client"
            )
        loaded = self._loaded.get(session)
        if loaded is not None:
            return loaded
        if not row["durable"]:
            raise ServiceError(
                f"the weights of sampling session {session!r} were in memory only and are gone (the server was restarted, or "
                "holds too many sessions); make a new sampling client"
            )
        sampler = self._load(owner, row)
        self._loaded.add(session, owner, sampler)
        return sampler

    def _load(self, owner: str, row: Json) -> Sampler:
        """Return what samples from a session's checkpoint or the base: the same for all sessions that are open on it."""
        path = row["path"]
        fingerprint = self._base if path is None else self._require_checkpoint(owner, path)
        sampler = self._shared.get(f"{path} {row['fingerprint']}")
        if sampler is not None:  # another session has them in memory, whatever the path holds by now
            return sampler
        self._require_same(row, fingerprint)
        weights = f"{path} {fingerprint}"
        sampler = self._shared.get(weights)
        if sampler is None:
            sampler = self._models.base_sampler() if path is None else self._models.saved_sampler(path)
            self._shared[weights] = sampler
        return sampler

    def _require_same(self, row: Json, fingerprint: str) -> None:
        """Check that a session's path, or the base, still holds the weights that the session was made on.

        Raises:
            ServiceError: it holds others.
        """
        session, path, expected = row["id"], row["path"], row["fingerprint"]
        if expected is None:  # made by an older version: only the time tells
            checkpoint = None if path is None else self._journal.checkpoint(path)
            if checkpoint is None or checkpoint["created"] <= row["created"]:
                self._journal.bind_sampler(session, fingerprint)
                return
        if fingerprint == expected:
            return
        if path is None:
            raise ServiceError(
                f"sampling session {session!r} was made on another base model than this server has now, though it is called "
                f"{self._models.base.name!r} too; make a new sampling client"
            )
        raise ServiceError(
            f"{path} was overwritten after sampling session {session!r} was made from it, and its weights then are not in "
            "memory any more; make a new sampling client"
        )

    def _require_checkpoint(self, owner: str, path: str) -> str:
        """Return the fingerprint of a checkpoint that can be sampled from."""
        model, _, _ = self._models.checkpoints.parts(path)
        row, fingerprint = self._journal.model(model), self._models.checkpoints.fingerprint(path)
        if row is None or row["owner"] != owner or not fingerprint:
            raise NotFoundError(f"there is no checkpoint {path!r} on this server{self._journal.caveat}")
        self._models.checkpoints.loadable(path)
        return fingerprint
