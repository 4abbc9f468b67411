"""The answer of a sampler on the wire."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, final

import torch
from torch import Tensor

from .protobuf import DTYPE_NUMBERS, message, packed
from .sparse import SparseRows

__all__ = ["NOT_SCORED", "SampleScores", "TopK", "encode_sample"]

NOT_SCORED: Final = -99999.0  # beside token 0: nothing is said about this position
_STOP_REASONS: Final = {"stop": 0, "length": 1}
TopK: TypeAlias = tuple[Tensor, Tensor]


@final
@dataclass(frozen=True, eq=False)
class SampleScores:
    """What a sample's answer holds beside the completions; None: was not asked for.

    Attributes:
        prompt: fp32 [T]; log-probs of the prompt's tokens, NaN where not scored.
        prompt_top: ids and log-probs [T, k] of the top-k tokens at the prompt's positions.
        completion_top: the same at each completion's positions.
        sampled: ids and log-probs [T - 1, k] of tokens sampled at the prompt's positions.
        given: fp32 [T - 1, K]; log-probs of the tokens that the client gave, in the layout in which they were given.
    """

    prompt: Tensor | None = None
    prompt_top: TopK | None = None
    completion_top: Sequence[TopK] = ()
    sampled: TopK | None = None
    given: Tensor | SparseRows | None = None


def encode_sample(sequences: Sequence[tuple[str, Sequence[int], Sequence[float]]], scores: SampleScores) -> bytes:
    """Write a ``SampleResponse`` from (stop reason, tokens, log-probs) and what was asked for beside them."""
    written = message("SampleResponse")()
    for i, (reason, tokens, logprobs) in enumerate(sequences):
        sequence = written.sequences.add(
            stop_reason=_STOP_REASONS[reason],
            tokens=packed(torch.tensor(tokens, dtype=torch.int32)),
            logprobs=packed(torch.tensor(logprobs, dtype=torch.float32)),
        )
        if scores.completion_top:
            _write_top(sequence.topk_sampled_logprobs, scores.completion_top[i])
    if scores.prompt is not None:
        written.prompt_logprobs = packed(scores.prompt.float())
    if scores.prompt_top is not None:
        _write_top(written.topk_prompt_logprobs, scores.prompt_top)
    if scores.given is not None:
        _write_tensor(written.target_prompt_logprobs, scores.given)
    if scores.sampled is not None:
        _write_tensor(written.prompt_alt_tokens.tokens, scores.sampled[0])
        _write_tensor(written.prompt_alt_tokens.logprobs, scores.sampled[1])
    return bytes(written.SerializeToString())


def _write_top(field: Any, top: TopK) -> None:
    ids, logprobs = top
    field.token_ids, field.logprobs = packed(ids.int()), packed(logprobs.float())
    field.length, field.k = ids.shape


def _write_tensor(field: Any, values: Tensor | SparseRows) -> None:
    if isinstance(values, SparseRows):
        sparse, numbers = field.sparse_csr, values.values
        sparse.values, sparse.crow_indices, sparse.col_indices = map(packed, (numbers, values.offsets, values.columns))
    else:
        field.dense, numbers = packed(values), values
    field.dtype = DTYPE_NUMBERS[numbers.dtype]
    field.shape.extend(values.shape)
