"""What every sampler does, whatever its model: check the prompts, and draw from logits."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from ..datums.types import ModelInput
from ..errors import DatumError, InvalidDatumsError
from .types import SamplingParams

__all__ = ["check_prompts", "choose_tokens"]


def check_prompts(
    prompts: Sequence[ModelInput],
    n: int,
    vocab_size: int | None,
    context: int | None = None,
    max_tokens: int = 1,
) -> None:
    """Check the prompts of one call.

    Args:
        prompts: at least one.
        n: completions of each.
        vocab_size: token ids are below it; None = not known.
        context: longest text of the model, tokens; None = no limit.
        max_tokens: longest completion.

    Raises:
        DatumError: there is no prompt, or no completion is asked for.
        InvalidDatumsError: a prompt is empty, is no `ModelInput`, has tokens outside the vocabulary, or leaves the context;
            lists all of them.
    """
    if n < 1:
        raise DatumError(f"n must be at least 1 completion per prompt, got {n}")
    if not prompts:
        raise DatumError("prompts is empty: give at least one ModelInput")
    problems = []
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, ModelInput):
            problems.append(f"prompt {i}: expected a ModelInput, got {type(prompt).__name__}; use ModelInput.from_ints")
        elif len(prompt) == 0:
            problems.append(f"prompt {i}: is empty; give at least one token")
        elif vocab_size is not None and not 0 <= int(prompt.tokens.min()) <= int(prompt.tokens.max()) < vocab_size:
            problems.append(f"prompt {i}: has token ids outside the vocabulary of {vocab_size}")
        elif context is not None and len(prompt) + max_tokens - 1 > context:
            problems.append(
                f"prompt {i}: {len(prompt)} tokens and max_tokens={max_tokens} leave the model's context of {context} tokens"
            )
    if problems:
        raise InvalidDatumsError(problems)


def choose_tokens(logits: Tensor, params: SamplingParams, generators: Sequence[torch.Generator]) -> Tensor:
    """Draw one token per row from the tempered, cut distribution, [R]; neighbours share a generator or do not."""
    if params.temperature == 0:
        return logits.argmax(-1)
    tempered = logits / params.temperature
    if params.top_k != -1:
        smallest = tempered.topk(min(params.top_k, tempered.shape[-1]), -1).values[:, -1:]
        tempered = tempered.masked_fill(tempered < smallest, -torch.inf)
    if params.top_p < 1.0:
        tempered = _nucleus(tempered, params.top_p)
    shared = [(generator, len(list(rows))) for generator, rows in groupby(generators)]
    parts = tempered.softmax(-1).split([count for _, count in shared])
    drawn = [torch.multinomial(part, 1, generator=one) for part, (one, _) in zip(parts, shared, strict=True)]
    return torch.cat(drawn)[:, 0]


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Keep the smallest set of tokens whose probability reaches ``top_p``; at least one."""
    ordered, order = logits.sort(-1, descending=True)
    mass_before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    cut = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, mass_before >= top_p)
    return logits.masked_fill(cut, -torch.inf)
