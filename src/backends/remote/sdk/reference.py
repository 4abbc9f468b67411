"""The base model of a service, which can only score: by a sampler, or by a training client that never trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, final

import torch
from torch import Tensor

from ....datums.types import Datum
from ....errors import UnsupportedError
from ...calls.requests import scored
from ..connection.futures import Sent
from .convert import bare, logprobs_of

__all__ = ["BaseScorer", "SamplerScorer", "TrainerScorer"]


class BaseScorer(Protocol):
    """Scores with the base model of a service."""

    def score(self, data: Sequence[Datum]) -> Sent[list[Tensor]]:
        """Ask for the log-probs of the target tokens, one tensor per datum."""
        ...


@final
class TrainerScorer:
    """Scores any targets, by a training client of the base model.

    Args:
        trainer: an SDK's.
        datums: makes that SDK's datums.
        deadline: seconds that a result waits; None = for ever.
    """

    def __init__(
        self, trainer: Any, datums: Callable[[Sequence[Datum]], list[Any]], deadline: float | None = None
    ) -> None:
        self._trainer, self._datums, self._deadline = trainer, datums, deadline

    def score(self, data: Sequence[Datum]) -> Sent[list[Tensor]]:
        sent = self._trainer.forward(self._datums(bare(data)), "cross_entropy")
        return Sent([sent], lambda answers: logprobs_of(answers[0]), deadline=self._deadline)


@final
class SamplerScorer:
    """Scores next tokens, by the service's sampler of the base model.

    Args:
        sampler: an SDK's.
        model_input: that SDK's type.
        deadline: seconds that a result waits; None = for ever.
    """

    def __init__(self, sampler: Any, model_input: Any, deadline: float | None = None) -> None:
        self._sampler, self._model_input, self._deadline = sampler, model_input, deadline

    def score(self, data: Sequence[Datum]) -> Sent[list[Tensor]]:
        """Score ``data``, whose targets must be its own next tokens (that is what a sampler can score).

        Raises:
            UnsupportedError: they are others.
        """
        texts = [self._model_input.from_ints(_whole(i, datum)) for i, datum in enumerate(data)]
        sent = [self._sampler.compute_logprobs(text) for text in texts]
        return Sent(sent, _next_tokens, deadline=self._deadline)


def _next_tokens(answers: list[Any]) -> list[Tensor]:
    return [torch.tensor([float(x) for x in answer[1:]]) for answer in answers]


def _whole(index: int, datum: Datum) -> list[int]:
    datum = scored(datum)
    tokens, targets = datum.model_input.tokens, datum.loss_fn_inputs["target_tokens"].to_torch()
    if targets.dim() != 1 or not torch.equal(tokens[1:], targets[:-1]):
        raise UnsupportedError(f"datum {index}: a sampler scores next tokens only; these targets are others")
    return [*tokens.tolist(), int(targets[-1])]
