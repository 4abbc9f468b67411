"""The model's next-token distribution along one text: its most probable tokens, draws from it, and tokens that are given."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ....ops.logprobs import head_logits
from ...calls.requests import ScoreRequest
from ..causal_lm import CausalLM
from ..execution.forward import needed_hidden

__all__ = ["given_tokens", "sampled_tokens", "top_k_tokens"]

_ROWS = 256  # positions whose logits exist together


def top_k_tokens(model: CausalLM, tokens: Tensor, k: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """Return the ``k`` most probable tokens after each but the last, the most probable first.

    Args:
        model: the model.
        tokens: int64 [T].
        k: at most the vocabulary.
        first: of the tokens after which they are looked for; those before it take neither work of the head nor memory.

    Returns:
        Their ids, int64 [T - 1 - first, k], and log-probs, fp32 [T - 1 - first, k].
    """
    found = [logprobs.topk(k, -1) for logprobs in _logprobs(model, tokens, first)]
    return torch.cat([one.indices for one in found]).cpu(), torch.cat([one.values for one in found]).float().cpu()


def sampled_tokens(
    model: CausalLM, tokens: Tensor, k: int, temperature: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Sample ``k`` tokens, with replacement, after each but the last; shapes as of `top_k_tokens`, log-probs untempered."""
    ids, values = [], []
    for logprobs in _logprobs(model, tokens):
        if temperature == 0:
            sampled = logprobs.argmax(-1, keepdim=True).expand(-1, k)
        else:
            above = logprobs - logprobs.amax(-1, keepdim=True)  # a temperature next to 0 must not make all of them -inf
            tempered = (above / max(temperature, torch.finfo(above.dtype).tiny)).softmax(-1)
            sampled = torch.multinomial(tempered, k, replacement=True, generator=generator)
        ids.append(sampled)
        values.append(logprobs.gather(-1, sampled))
    return torch.cat(ids).cpu(), torch.cat(values).float().cpu()


def given_tokens(model: CausalLM, tokens: Tensor, given: Tensor) -> Tensor:
    """Return the log-probs of ``given`` [T - 1, K] tokens, each row after the token of its place; 0.0 where it is negative."""
    parts, first = [], 0
    for logprobs in _logprobs(model, tokens):
        ids = given[first : first + len(logprobs)].to(logprobs.device)
        found = logprobs.gather(-1, ids.clamp(min=0))
        parts.append(torch.where(ids < 0, torch.zeros_like(found), found))
        first += len(logprobs)
    return torch.cat(parts).float().cpu()


@torch.no_grad()
def _logprobs(model: CausalLM, tokens: Tensor, first: int = 0) -> Iterator[Tensor]:
    """Yield log-probs of the whole vocabulary after each token from one on but the last, some rows at a time, [R, V]."""
    if len(tokens) - 1 <= first:
        yield torch.empty(0, model.head().weight.shape[0])
        return
    request = ScoreRequest(tokens[:-1], tokens[1:], torch.arange(len(tokens) - 1) >= first)
    for hidden in needed_hidden(model, [request], "single").split(_ROWS):
        yield torch.log_softmax(head_logits(hidden, model.head()), -1)
