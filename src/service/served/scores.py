"""Log-probs that a client asks for beside a completion: of the prompt, of top-k tokens, of sampled and of given ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self, final

import torch
from torch import Tensor

from ...backends.types import Rollout
from ...datums.types import ModelInput
from ...errors import ConfigError
from ..durability.sequencer import require_number
from ..wire.json_form import decode_json_tensor
from ..wire.sampling import NOT_SCORED, SampleScores, TopK
from .registry import Sampler

__all__ = ["RequestedScores"]

_MOST: Final = 1 << 24  # numbers of one answer


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
