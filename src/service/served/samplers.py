"""Sampling at the service: its sessions, the log-probs that are asked for beside completions, and where a completion ends."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self, final

import torch
from torch import Tensor

from ...backends import SamplingParams
from ...backends.native.sampling import Ends
from ...backends.types import Rollout
from ...datums.types import ModelInput
from ...errors import ConfigError, NotFoundError, ServiceError, TooLargeError
from ..durability.journal import Journal
from ..durability.sequencer import Sequencer, require_number
from ..limits import Limits
from ..wire.json_form import decode_json_tensor
from ..wire.protobuf import tokens_of
from ..wire.sampling import NOT_SCORED, SampleScores, TopK, encode_sample
from .registry import Base, Sampler, ServedModels

__all__ = ["Samplers"]

Json = dict[str, Any]
_USED = "the number of {} was used for another request; numbers go up by one"
_MOST: Final = 1 << 24  # numbers of one answer
_KNOWN: Final = {"max_tokens", "temperature", "top_k", "top_p", "stop", "seed"}
_BYTES: Final = 4  # a character's most, and a token is at least one


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
        self._loaded: OrderedDict[str, Sampler] = OrderedDict()

    def __len__(self) -> int:
        return len(self._loaded)

    def add(self, session: str, owner: str, sampler: Sampler) -> None:
        """Open a session on weights in memory; the one used longest ago goes if there are too many."""
        if self._journal.sampler(session) is not None:
            raise ServiceError(_USED.format(session))
        self._journal.add_sampler(session, owner, None, durable=False)
        self._retain(session, sampler)

    def create(self, session: str, owner: str, body: Json) -> Json:
        """Open a session on a checkpoint, or on the base."""
        path, base = body.get("model_path"), self._models.base.name
        if path is not None:
            self._require_checkpoint(owner, path)
        elif body.get("base_model") != base:
            raise ServiceError(f"this server serves {base!r}, not {body.get('base_model')!r}")
        known = self._journal.sampler(session)
        if known is not None and (known["path"], known["durable"]) != (path, 1):
            raise ServiceError(_USED.format(session))
        self._journal.add_sampler(session, owner, path, durable=True)
        return {"type": "create_sampling_session", "sampling_session_id": session}

    def info(self, owner: str, session: str) -> Json:
        """What a session samples from."""
        row = self._row(owner, session)
        return {"sampler_id": session, "base_model": self._models.base.name, "model_path": row["path"]}

    def sample(self, owner: str, raw: bytes, body: Json) -> Json:
        """Draw completions of one prompt; with ``prompt_logprobs`` score it."""
        session, n = body["sampling_session_id"], require_number("num_samples", body.get("num_samples", 1))
        number = None if body.get("seq_id") is None else require_number("seq_id", body["seq_id"])
        self._row(owner, session)
        queue = f"{session}:asample"
        self._sequencer.open(queue)

        def work() -> bytes:
            if not 1 <= n <= self._limits.samples:
                raise TooLargeError(f"num_samples is {n}; this server draws 1 to {self._limits.samples}")
            sampler, prompt = self._sampler(owner, session), ModelInput.from_ints(tokens_of(body["prompt"]))
            params, ends = sampling_of(body.get("sampling_params") or {}, self._models.base, prompt)
            requested = RequestedScores.of(body, prompt, params.temperature)
            rollouts = sampler.sample(prompt, n, params, ends)
            scores = requested.answer(sampler, prompt, rollouts)
            return encode_sample([(r.stop_reason, r.tokens, r.logprobs) for r in rollouts], scores)

        request = self._sequencer.submit(owner, queue, number, raw, "sample", work, ordered=False)
        ids = [f"{session}:{0 if number is None else number}:{i}" for i in range(min(n, self._limits.samples))]
        return {"request_id": request, "sample_sequence_ids": ids}

    def _row(self, owner: str, session: Any) -> Json:
        row = self._journal.sampler(session) if isinstance(session, str) else None
        if row is None or row["owner"] != owner:
            raise NotFoundError(f"there is no sampling session {session!r} on this server")
        return row

    def _sampler(self, owner: str, session: str) -> Sampler:
        if session in self._loaded:
            self._loaded.move_to_end(session)
            return self._loaded[session]
        row = self._row(owner, session)
        if not row["durable"]:
            raise ServiceError(
                f"the weights of sampling session {session!r} were in memory only and are gone (the server was restarted, or "
                "holds too many sessions); make a new sampling client"
            )
        if row["path"] is None:
            sampler = self._models.base_sampler()
        else:
            self._require_checkpoint(owner, row["path"])
            sampler = self._models.saved_sampler(row["path"])
        self._retain(session, sampler)
        return sampler

    def _require_checkpoint(self, owner: str, path: str) -> None:
        model, _, _ = self._models.checkpoints.parts(path)
        self._models.checkpoints.locate(path)
        row = self._journal.model(model)
        if row is None or row["owner"] != owner:
            raise NotFoundError(f"there is no checkpoint {path!r} on this server")

    def _retain(self, session: str, sampler: Sampler) -> None:
        self._loaded[session] = sampler
        while len(self._loaded) > self._limits.samplers:
            self._loaded.popitem(last=False)


@final
@dataclass(frozen=True)
class RequestedScores:
    """The scores that one request asks for.

    Attributes:
        prompt: log-probs of the prompt's tokens.
        last: of how many of them; None = all but the first.
        prompt_top, completion_top: k of the top-k tokens at each position.
        sampled: how many tokens are sampled at each position of the prompt.
        temperature: they are sampled at.
        given: int64 [T - 1, K]; tokens of the prompt's positions, -1 = none.
    """

    prompt: bool
    last: int | None
    prompt_top: int
    completion_top: int
    sampled: int
    temperature: float
    given: Tensor | None

    @classmethod
    def of(cls, body: Mapping[str, Any], prompt: ModelInput, temperature: float) -> Self:
        """Read a request.

        Raises:
            ConfigError: a number that cannot be, or tokens that do not fit the prompt.
        """
        last, given = body.get("prompt_logprobs_last_n"), body.get("target_prompt_logprobs")
        if last is not None and not 1 <= require_number("prompt_logprobs_last_n", last) < len(prompt):
            raise ConfigError(f"prompt_logprobs_last_n is {last}; the prompt has {len(prompt) - 1} tokens to score")
        tensor = None if given is None else decode_json_tensor(given).long()
        if tensor is not None and (tensor.dim() != 2 or len(tensor) != len(prompt) - 1):
            raise ConfigError(
                f"target_prompt_logprobs has the shape {tuple(tensor.shape)}; a prompt of {len(prompt)} tokens takes "
                f"[{len(prompt) - 1}, K]"
            )
        return cls(
            prompt=bool(body.get("prompt_logprobs")),
            last=last,
            prompt_top=_count(body, "topk_prompt_logprobs"),
            completion_top=_count(body, "topk_sample_logprobs"),
            sampled=_count(body, "prompt_alt_tokens_k"),
            temperature=temperature,
            given=tensor,
        )

    def answer(self, sampler: Sampler, prompt: ModelInput, rollouts: Sequence[Rollout]) -> SampleScores:
        """Compute them."""
        tokens = prompt.tokens
        self._check(sampler.vocab_size, len(tokens) + sum(len(r.tokens) for r in rollouts))
        tops = [self._completion_top(sampler, tokens, r.tokens) for r in rollouts] if self.completion_top else []
        return SampleScores(
            prompt=self._blank(torch.tensor(sampler.prompt_logprobs(prompt))) if self.prompt else None,
            prompt_top=self._prompt_top(sampler, tokens) if self.prompt_top else None,
            completion_top=tops,
            sampled=sampler.sampled(tokens, self.sampled, self.temperature) if self.sampled else None,
            given=None if self.given is None else sampler.given(tokens, self.given),
        )

    def _check(self, vocab: int, tokens: int) -> None:
        most = max(self.prompt_top, self.completion_top)
        if most > vocab:
            raise ConfigError(f"the {most} most likely tokens were asked for; the vocabulary has {vocab}")
        columns = 0 if self.given is None else self.given.shape[1]
        if tokens * max(most, self.sampled, columns) > _MOST:
            raise ConfigError(f"more than {_MOST} numbers were asked for at once; ask for fewer of each position")
        if self.given is not None and self.given.numel() and int(self.given.max()) >= vocab:
            raise ConfigError(f"target_prompt_logprobs names token {int(self.given.max())} of a vocabulary of {vocab}")

    def _prompt_top(self, sampler: Sampler, tokens: Tensor) -> TopK:
        ids, logprobs = sampler.top_k(tokens, self.prompt_top)
        ids, logprobs = (torch.cat([x.new_zeros(1, self.prompt_top), x]) for x in (ids, logprobs))
        unscored = torch.ones(len(ids), 1, dtype=torch.bool)
        unscored[len(ids) - self.last if self.last else 1 :] = False
        return ids.masked_fill(unscored, 0), logprobs.masked_fill(unscored, NOT_SCORED)

    def _completion_top(self, sampler: Sampler, prompt: Tensor, tokens: Sequence[int]) -> TopK:
        ids, logprobs = sampler.top_k(torch.cat([prompt, torch.tensor(tokens)]), self.completion_top)
        return ids[len(prompt) - 1 :], logprobs[len(prompt) - 1 :]

    def _blank(self, logprobs: Tensor) -> Tensor:
        if self.last:
            logprobs[: -self.last] = torch.nan
        return logprobs


def _count(body: Mapping[str, Any], name: str) -> int:
    return require_number(name, body.get(name) or 0)


def sampling_of(given: Mapping[str, Any], base: Base, prompt: ModelInput) -> tuple[SamplingParams, Ends | None]:
    """Read ``sampling_params``.

    ``stop`` absent: the model's own end-of-text tokens; token ids: these and no others; strings: the completion also ends
    with the token after which its text holds one of them. ``max_tokens`` absent: as far as the model's context goes.

    Raises:
        ConfigError: a key or value that is not known.
    """
    unknown = sorted(k for k, v in given.items() if k not in _KNOWN and v is not None)
    if unknown:
        raise ConfigError(f"sampling_params has keys that this server does not know: {unknown}")
    chosen = {k: v for k, v in given.items() if v is not None}
    if "max_tokens" not in chosen and base.context is not None:
        chosen["max_tokens"] = max(1, base.context - len(prompt))
    stop = chosen.pop("stop", None)
    strings = [stop] if isinstance(stop, str) else stop
    if strings is None or (isinstance(strings, list) and all(type(t) is int for t in strings)):
        return SamplingParams(**chosen, stop=strings), None
    if not isinstance(strings, list) or not all(isinstance(t, str) and t for t in strings):
        raise ConfigError(f"stop must be a string, a list of strings, or a list of token ids, got {stop!r}")
    return SamplingParams(**chosen), _holds(strings, base)


def _holds(strings: Sequence[str], base: Base) -> Ends:
    tokenizer, reach = base.tokenizer(), _BYTES * max(map(len, strings))

    def ends(tokens: Sequence[int]) -> bool:
        text = tokenizer.decode(list(tokens[-reach:]), skip_special_tokens=False)
        return any(string in text for string in strings)

    return ends
