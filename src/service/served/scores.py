"""What a client asks of a sampler beside the tokens: scores of the prompt, and alternatives by rank, by name, by chance."""

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
from ..wire.sampling import NOT_SCORED, Likeliest, SampleScores
from .registry import Sampler

__all__ = ["Asked"]

_MOST: Final = 1 << 24  # numbers of one answer


@final
@dataclass(frozen=True)
class Asked:
    """The scores that one request asks for.

    Attributes:
        prompt: log-probs of the prompt's tokens.
        last: of how many of them; None = all but the first.
        prompt_top, sampled_top: how many of the likeliest tokens at each position.
        drawn: how many tokens are drawn at each position of the prompt.
        temperature: they are drawn at.
        named: int64 [T - 1, K]; tokens of the prompt's positions, -1 = none.
    """

    prompt: bool
    last: int | None
    prompt_top: int
    sampled_top: int
    drawn: int
    temperature: float
    named: Tensor | None

    @classmethod
    def of(cls, body: Mapping[str, Any], prompt: ModelInput, temperature: float) -> Self:
        """Read a request.

        Raises:
            ConfigError: a number that cannot be, or tokens that do not fit the prompt.
        """
        last, named = body.get("prompt_logprobs_last_n"), body.get("target_prompt_logprobs")
        if last is not None and not 1 <= require_number("prompt_logprobs_last_n", last) < len(prompt):
            raise ConfigError(f"prompt_logprobs_last_n is {last}; the prompt has {len(prompt) - 1} tokens to score")
        tensor = None if named is None else decode_json_tensor(named).long()
        if tensor is not None and (tensor.dim() != 2 or len(tensor) != len(prompt) - 1):
            raise ConfigError(
                f"target_prompt_logprobs has the shape {tuple(tensor.shape)}; a prompt of {len(prompt)} tokens takes "
                f"[{len(prompt) - 1}, K]"
            )
        return cls(
            prompt=bool(body.get("prompt_logprobs")),
            last=last,
            prompt_top=_count(body, "topk_prompt_logprobs"),
            sampled_top=_count(body, "topk_sample_logprobs"),
            drawn=_count(body, "prompt_alt_tokens_k"),
            temperature=temperature,
            named=tensor,
        )

    def answer(self, sampler: Sampler, prompt: ModelInput, rollouts: Sequence[Rollout]) -> SampleScores:
        """Compute them."""
        tokens = prompt.tokens
        self._check(sampler.vocab_size, len(tokens) + sum(len(r.tokens) for r in rollouts))
        tops = [self._sampled(sampler, tokens, r.tokens) for r in rollouts] if self.sampled_top else []
        return SampleScores(
            prompt=self._blank(torch.tensor(sampler.prompt_logprobs(prompt))) if self.prompt else None,
            prompt_top=self._prompt_top(sampler, tokens) if self.prompt_top else None,
            sampled_top=tops,
            drawn=sampler.drawn(tokens, self.drawn, self.temperature) if self.drawn else None,
            named=None if self.named is None else sampler.named(tokens, self.named),
        )

    def _check(self, vocab: int, tokens: int) -> None:
        most = max(self.prompt_top, self.sampled_top)
        if most > vocab:
            raise ConfigError(f"{most} of the likeliest tokens were asked for; the vocabulary has {vocab}")
        columns = 0 if self.named is None else self.named.shape[1]
        if tokens * max(most, self.drawn, columns) > _MOST:
            raise ConfigError(f"more than {_MOST} numbers were asked for at once; ask for fewer of each position")
        if self.named is not None and self.named.numel() and int(self.named.max()) >= vocab:
            raise ConfigError(f"target_prompt_logprobs names token {int(self.named.max())} of a vocabulary of {vocab}")

    def _prompt_top(self, sampler: Sampler, tokens: Tensor) -> Likeliest:
        ids, logprobs = sampler.likeliest(tokens, self.prompt_top)
        ids, logprobs = (torch.cat([x.new_zeros(1, self.prompt_top), x]) for x in (ids, logprobs))
        unscored = torch.ones(len(ids), 1, dtype=torch.bool)
        unscored[len(ids) - self.last if self.last else 1 :] = False
        return ids.masked_fill(unscored, 0), logprobs.masked_fill(unscored, NOT_SCORED)

    def _sampled(self, sampler: Sampler, prompt: Tensor, tokens: Sequence[int]) -> Likeliest:
        ids, logprobs = sampler.likeliest(torch.cat([prompt, torch.tensor(tokens)]), self.sampled_top)
        return ids[len(prompt) - 1 :], logprobs[len(prompt) - 1 :]

    def _blank(self, logprobs: Tensor) -> Tensor:
        if self.last:
            logprobs[: -self.last] = torch.nan
        return logprobs


def _count(body: Mapping[str, Any], name: str) -> int:
    return require_number(name, body.get(name) or 0)
