"""The base model of a service, which can only score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch

from ...datums.types import Datum, TensorData
from ...errors import ConfigError, UnsupportedError
from ..cotangents import scored
from ..types import ForwardBackwardOutput
from .convert import sdk
from .futures import Pending, RemoteFuture

__all__ = ["BaseView"]


@final
class BaseView:
    """Scores next tokens with the base model, by the service's sampler."""

    def __init__(self, sampler: Any, deadline: float | None = None) -> None:
        self._sampler, self._deadline = sampler, deadline

    def forward(
        self, data: Sequence[Datum], loss_fn: str = "cross_entropy", loss_fn_config: Mapping[str, Any] | None = None
    ) -> RemoteFuture[ForwardBackwardOutput]:
        """Score ``data``, whose targets must be its own next tokens (that is what a sampler can score).

        Raises:
            UnsupportedError: they are others.
            ConfigError: another loss than ``cross_entropy``: a sampler gives log-probs, and no loss.
        """
        if loss_fn != "cross_entropy" or loss_fn_config:
            raise ConfigError(
                f"the reference of a service gives log-probs only; drop loss_fn={loss_fn!r} and its config"
            )
        sent = [self._sampler.compute_logprobs(whole) for whole in map(_whole, range(len(data)), data)]

        def read(answers: list[Any]) -> ForwardBackwardOutput:
            found = [torch.tensor([float(x) for x in scores[1:]]) for scores in answers]
            return ForwardBackwardOutput([{"logprobs": TensorData(x)} for x in found], {})

        return RemoteFuture(Pending(sent, read), "reference", deadline=self._deadline)


def _whole(index: int, datum: Datum) -> Any:
    datum = scored(datum)
    tokens, targets = datum.model_input.tokens, datum.loss_fn_inputs["target_tokens"].to_torch()
    if targets.dim() != 1 or not torch.equal(tokens[1:], targets[:-1]):
        raise UnsupportedError(f"datum {index}: a sampler scores next tokens only; these targets are others")
    return sdk().ModelInput.from_ints([*tokens.tolist(), int(targets[-1])])
