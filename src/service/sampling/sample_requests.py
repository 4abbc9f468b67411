"""What one request for samples asks for: how completions are sampled, where they end, and the scores beside them."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Self, final

import torch
from torch import Tensor

from ...backends import SamplingParams
from ...backends.native.decoding.requests import Ends
from ...backends.types import Rollout
from ...datums.types import ModelInput
from ...errors import ConfigError
from ..queueing.requirements import require_number
from ..served.registry import Base
from ..served.sampler import Sampler
from ..wire.json_form import decode_json_sparse, decode_json_tensor
from ..wire.sampling import NOT_SCORED, SampleScores, TopK
from ..wire.sparse import SparseRows

__all__ = ["RequestedScores", "sampling_of"]

_MOST: Final = 1 << 24  # numbers of one answer
_WHOLE: Final = frozenset(("max_tokens", "top_k", "seed"))
_REAL: Final = frozenset(("temperature", "top_p"))
_LARGEST: Final = 2**63
_STOPS: Final = 64  # strings that end a completion, each looked for after every token
_STOP_LENGTH: Final = 512
_BYTES: Final = 4  # a character's most, and a token is at least one


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
        cells: which cells of a matrix these are, where it was given as a sparse one.
    """

    prompt: bool
    last: int | None
    prompt_top: int
    completion_top: int
    sampled: int
    temperature: float
    given: Tensor | None
    cells: SparseRows | None

    @classmethod
    def of(cls, body: Mapping[str, Any], prompt: ModelInput, temperature: float) -> Self:
        """Read a request.

        Raises:
            ConfigError: a number that cannot be, or tokens that do not fit the prompt.
        """
        last, given = body.get("prompt_logprobs_last_n"), body.get("target_prompt_logprobs")
        if last is not None and not 1 <= require_number("prompt_logprobs_last_n", last) < len(prompt):
            raise ConfigError(f"prompt_logprobs_last_n is {last}; the prompt has {len(prompt) - 1} tokens to score")
        tensor, cells = _given(given)
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
            cells=cells,
        )

    def check(self, vocab: int, prompt: int, completions: int) -> None:
        """Check what is asked for against a vocabulary, and how large the answer can become.

        Args:
            vocab: rows of the head.
            prompt: its tokens.
            completions: the most tokens that all of them together can have.

        Raises:
            ConfigError: a token or a number of tokens beyond the vocabulary, or too large an answer.
        """
        most = max(self.prompt_top, self.completion_top)
        if most > vocab:
            raise ConfigError(f"the top-{most} tokens were asked for; the vocabulary has {vocab}")
        columns = 0 if self.given is None else self.given.shape[1]
        numbers = prompt * max(self.prompt_top, self.sampled, columns) + completions * self.completion_top
        if numbers > _MOST:
            raise ConfigError(
                f"up to {numbers:,} numbers were asked for at once, for a prompt of {prompt:,} tokens and completions of up to "
                f"{completions:,} together; this server answers {_MOST:,}: ask for fewer of each position, for fewer "
                "completions, or for a smaller max_tokens"
            )
        if self.given is not None and self.given.numel() and int(self.given.max()) >= vocab:
            raise ConfigError(f"target_prompt_logprobs names token {int(self.given.max())} of a vocabulary of {vocab}")

    def answer(
        self, sampler: Sampler, prompt: ModelInput, rollouts: Sequence[Rollout]
    ) -> Generator[None, None, SampleScores]:
        """Compute them, each forward in a slice of its own."""
        tokens, tops, answer = prompt.tokens, list[TopK](), SampleScores()
        for rollout in rollouts if self.completion_top else ():
            yield
            tops.append(self._completion_top(sampler, tokens, rollout.tokens))
        answer = replace(answer, completion_top=tops)
        if self.prompt:
            yield
            answer = replace(answer, prompt=self._blank(torch.tensor(sampler.prompt_logprobs(prompt))))
        if self.prompt_top:
            yield
            answer = replace(answer, prompt_top=self._prompt_top(sampler, tokens))
        if self.sampled:
            yield
            answer = replace(answer, sampled=sampler.sampled(tokens, self.sampled, self.temperature))
        if self.given is not None:
            yield
            scores = sampler.given(tokens, self.given)
            answer = replace(answer, given=scores if self.cells is None else self.cells.unpacked(scores))
        return answer

    def _prompt_top(self, sampler: Sampler, tokens: Tensor) -> TopK:
        ids, logprobs = sampler.top_k(tokens, self.prompt_top)
        ids, logprobs = (torch.cat([x.new_zeros(1, self.prompt_top), x]) for x in (ids, logprobs))
        unscored = torch.ones(len(ids), 1, dtype=torch.bool)
        unscored[len(ids) - self.last if self.last else 1 :] = False
        return ids.masked_fill(unscored, 0), logprobs.masked_fill(unscored, NOT_SCORED)

    def _completion_top(self, sampler: Sampler, prompt: Tensor, tokens: Sequence[int]) -> TopK:
        return sampler.top_k(torch.cat([prompt, torch.tensor(tokens)]), self.completion_top, len(prompt) - 1)

    def _blank(self, logprobs: Tensor) -> Tensor:
        if self.last:
            logprobs[: -self.last] = torch.nan
        return logprobs


def _given(value: Any) -> tuple[Tensor | None, SparseRows | None]:
    """Read the tokens that a client gives: in a sparse matrix every cell that is not listed names none."""
    if value is None:
        return None, None
    try:
        if not isinstance(value, Mapping) or value.get("sparse_crow_indices") is None:
            return decode_json_tensor(value).long(), None
        cells = decode_json_sparse(value)
        return cells.packed(-1).long(), cells
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ConfigError(f"target_prompt_logprobs cannot be read: {error}") from error


def _count(body: Mapping[str, Any], name: str) -> int:
    return require_number(name, body.get(name) or 0)


def sampling_of(given: Mapping[str, Any], base: Base, prompt: ModelInput) -> tuple[SamplingParams, Ends | None]:
    """Read ``sampling_params``.

    ``stop`` absent: the model's own end-of-text tokens; token ids: these and no others; strings: the completion also ends
    with the token after which its text holds one of them. ``max_tokens`` absent: as far as the model's context goes.

    Raises:
        ConfigError: a key or value that is not known.
    """
    if not isinstance(given, Mapping):
        raise ConfigError(f"sampling_params must be an object, got {given!r:.80}")
    chosen = {name: value for name, value in given.items() if value is not None}
    unknown = sorted(chosen.keys() - _WHOLE - _REAL - {"stop"})
    if unknown:
        raise ConfigError(f"sampling_params has keys that this server does not know: {unknown!r:.200}")
    stop = chosen.pop("stop", None)
    _check_numbers(chosen)
    if "max_tokens" not in chosen and base.context is not None:
        chosen["max_tokens"] = max(1, base.context - len(prompt))
    strings = [stop] if isinstance(stop, str) else stop
    if strings is None or (isinstance(strings, list) and all(type(t) is int for t in strings)):
        return SamplingParams(**chosen, stop=strings), None
    _check_strings(strings)
    return SamplingParams(**chosen), _holds(strings, base)


def _check_numbers(chosen: Mapping[str, Any]) -> None:
    for name, value in chosen.items():
        kind, expected = (int, "a whole number") if name in _WHOLE else ((int, float), "a number")
        large = isinstance(value, int) and abs(value) >= _LARGEST
        if large or isinstance(value, bool) or not isinstance(value, kind):
            raise ConfigError(f"sampling_params.{name} must be {expected} below 2**63, got {value!r:.80}")


def _check_strings(strings: Any) -> None:
    if not isinstance(strings, list) or not all(isinstance(t, str) and t for t in strings):
        raise ConfigError(f"stop must be a string, a list of strings, or a list of token ids, got {strings!r:.80}")
    if len(strings) > _STOPS or max(map(len, strings)) > _STOP_LENGTH:
        raise ConfigError(
            f"stop has {len(strings)} strings, the longest of {max(map(len, strings))} characters; this server looks for at "
            f"most {_STOPS} strings of {_STOP_LENGTH} characters"
        )


def _holds(strings: Sequence[str], base: Base) -> Ends:
    """Return what says whether the last tokens of a completion hold one of these strings."""
    tokenizer, reach = base.tokenizer(), _BYTES * max(map(len, strings))

    def ends(tokens: Sequence[int]) -> bool:
        text = tokenizer.decode(list(tokens[-reach:]), skip_special_tokens=False)
        return any(string in text for string in strings)

    return ends
