"""The answer of a sampler on the wire."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, final

import torch
from torch import Tensor

from .protobuf import DTYPE_NUMBERS, message, packed

__all__ = ["NOT_SCORED", "Likeliest", "SampleScores", "encode_sample"]

NOT_SCORED: Final = -99999.0  # beside token 0: nothing is said about this position
_STOP_REASONS: Final = {"stop": 0, "length": 1}
Likeliest: TypeAlias = tuple[Tensor, Tensor]


@final
@dataclass(frozen=True, eq=False)
class SampleScores:
    """What a sample's answer holds beside the completions; None: was not asked for.

    Attributes:
        prompt: fp32 [T]; log-probs of the prompt's tokens, NaN where not scored.
        prompt_top: ids and log-probs [T, k] of the likeliest tokens at the prompt's positions.
        sampled_top: the same of each completion's positions.
        drawn: ids and log-probs [T - 1, k] of tokens drawn at the prompt's positions.
        named: fp32 [T - 1, K]; log-probs of the tokens that were named.
    """

    prompt: Tensor | None = None
    prompt_top: Likeliest | None = None
    sampled_top: Sequence[Likeliest] = ()
    drawn: Likeliest | None = None
    named: Tensor | None = None


def encode_sample(sequences: Sequence[tuple[str, Sequence[int], Sequence[float]]], scores: SampleScores) -> bytes:
    """Write a ``SampleResponse`` from (stop reason, tokens, log-probs) and what was asked for beside them."""
    written = message("SampleResponse")()
    for i, (reason, tokens, logprobs) in enumerate(sequences):
        one = written.sequences.add(
            stop_reason=_STOP_REASONS[reason],
            tokens=packed(torch.tensor(tokens, dtype=torch.int32)),
            logprobs=packed(torch.tensor(logprobs, dtype=torch.float32)),
        )
        if scores.sampled_top:
            _write_top(one.topk_sampled_logprobs, scores.sampled_top[i])
    if scores.prompt is not None:
        written.prompt_logprobs = packed(scores.prompt.float())
    if scores.prompt_top is not None:
        _write_top(written.topk_prompt_logprobs, scores.prompt_top)
    if scores.named is not None:
        _write_tensor(written.target_prompt_logprobs, scores.named)
    if scores.drawn is not None:
        _write_tensor(written.prompt_alt_tokens.tokens, scores.drawn[0])
        _write_tensor(written.prompt_alt_tokens.logprobs, scores.drawn[1])
    return bytes(written.SerializeToString())


def _write_top(field: Any, found: Likeliest) -> None:
    ids, logprobs = found
    field.token_ids, field.logprobs = packed(ids.int()), packed(logprobs.float())
    field.length, field.k = ids.shape


def _write_tensor(field: Any, values: Tensor) -> None:
    field.dense, field.dtype = packed(values), DTYPE_NUMBERS[values.dtype]
    field.shape.extend(values.shape)
