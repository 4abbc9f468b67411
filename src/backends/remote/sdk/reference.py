"""The base model of a service, which can only score: by a sampler, or by a training client that never trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch

from ....datums.types import Datum
from ....errors import ConfigError, UnsupportedError
from ...calls.requests import scored
from ...types import ForwardBackwardOutput
from ..connection.futures import RemoteFuture, Sent
from .convert import bare, logprobs_of

__all__ = ["BaseView", "SamplerView"]


@final
class BaseView:
    """Scores any targets with the base model, by a training client of it.

    Args:
        trainer: an SDK's.
        datums: makes that SDK's datums.
        deadline: seconds that a result waits; None = for ever.
    """

    def __init__(
        self, trainer: Any, datums: Callable[[Sequence[Datum]], list[Any]], deadline: float | None = None
    ) -> None:
        self._trainer, self._datums, self._deadline = trainer, datums, deadline

    def forward(
        self, data: Sequence[Datum], loss_fn: str = "cross_entropy", loss_fn_config: Mapping[str, Any] | None = None
    ) -> RemoteFuture[ForwardBackwardOutput]:
        """Score the target tokens of ``data``.

        Raises:
            ConfigError: another loss than ``cross_entropy``.
        """
        _require_plain(loss_fn, loss_fn_config)
        sent = self._trainer.forward(self._datums(bare(data)), "cross_entropy")

        def read(answers: list[Any]) -> ForwardBackwardOutput:
            return ForwardBackwardOutput.of(logprobs_of(answers[0]), {})

        return Sent([sent], read, deadline=self._deadline).future("reference")


@final
class SamplerView:
    """Scores next tokens with the base model, by the service's sampler.

    Args:
        sampler: an SDK's.
        model_input: that SDK's type.
        deadline: seconds that a result waits; None = for ever.
    """

    def __init__(self, sampler: Any, model_input: Any, deadline: float | None = None) -> None:
        self._sampler, self._model_input, self._deadline = sampler, model_input, deadline

    def forward(
        self, data: Sequence[Datum], loss_fn: str = "cross_entropy", loss_fn_config: Mapping[str, Any] | None = None
    ) -> RemoteFuture[ForwardBackwardOutput]:
        """Score ``data``, whose targets must be its own next tokens (that is what a sampler can score).

        Raises:
            UnsupportedError: they are others.
            ConfigError: another loss than ``cross_entropy``: a sampler gives log-probs, and no loss.
        """
        _require_plain(loss_fn, loss_fn_config)
        sent = [
            self._sampler.compute_logprobs(self._model_input.from_ints(_whole(i, datum)))
            for i, datum in enumerate(data)
        ]

        def read(answers: list[Any]) -> ForwardBackwardOutput:
            return ForwardBackwardOutput.of([torch.tensor([float(x) for x in answer[1:]]) for answer in answers], {})

        return Sent(sent, read, deadline=self._deadline).future("reference")


def _require_plain(loss_fn: str, loss_fn_config: Mapping[str, Any] | None) -> None:
    if loss_fn != "cross_entropy" or loss_fn_config:
        raise ConfigError(f"the reference of a service gives log-probs only; drop loss_fn={loss_fn!r} and its config")


def _whole(index: int, datum: Datum) -> list[int]:
    datum = scored(datum)
    tokens, targets = datum.model_input.tokens, datum.loss_fn_inputs["target_tokens"].to_torch()
    if targets.dim() != 1 or not torch.equal(tokens[1:], targets[:-1]):
        raise UnsupportedError(f"datum {index}: a sampler scores next tokens only; these targets are others")
    return [*tokens.tolist(), int(targets[-1])]
