"""Operations from hidden states to log-probs, none of which ever holds the logits of all tokens. Torch only."""

from __future__ import annotations

from .head import Head
from .labels import logprobs_from_logits, logprobs_of
from .logprobs import head_logits, logprob_surrogate, selected_logprobs
from .own_positions import own_positions_logprobs
from .vocab_parallel import vocab_parallel_logprobs

__all__ = [
    "Head",
    "head_logits",
    "logprob_surrogate",
    "logprobs_from_logits",
    "logprobs_of",
    "own_positions_logprobs",
    "selected_logprobs",
    "vocab_parallel_logprobs",
]
