"""A loss that was evaluated elsewhere: all that is known of it are its cotangents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from ...datums.types import Datum
from ...errors import ConfigError, InvalidDatumsError
from ...losses.base import Loss
from ..calls.losses import as_loss
from ..calls.requests import ScoreRequest
from ..protocol import CustomLoss

__all__ = ["GivenCotangents", "given_loss"]


@final
@dataclass(frozen=True, eq=False)
class GivenCotangents:
    """The linear function of log-probs with given slopes: sum over tokens of cotangent * logprob.

    Its gradient is the cotangents, whatever the log-probs; its value means nothing.

    Args:
        cotangents: dL/dlogprob, one tensor a datum, of the shape of its targets.
    """

    cotangents: Sequence[Tensor]
    __name__ = "cotangents"

    def __call__(self, data: Sequence[Any], logprobs: list[Tensor]) -> tuple[Tensor, Mapping[str, float]]:
        products = [(c * x).sum() for c, x in zip(self.cotangents, logprobs, strict=True)]
        return torch.stack(products).sum(), {}


def given_loss(
    loss: str | Loss | CustomLoss | None, cotangents: Sequence[Tensor] | None, data: Sequence[Datum]
) -> Loss | CustomLoss:
    """Return the loss that is meant by a loss or by cotangents, of which just one is given.

    Raises:
        ConfigError: neither is given, or both.
        InvalidDatumsError: cotangents of another number or shape than the targets, or not finite.
    """
    if (loss is None) == (cotangents is None):
        raise ConfigError("give either loss_fn or cotangents=, one tensor of dL/dlogprob per datum")
    if cotangents is None:
        return as_loss(loss, None) if isinstance(loss, (str, Loss)) else loss  # type: ignore[return-value]  # not None
    if len(cotangents) != len(data):
        raise InvalidDatumsError(
            [f"cotangents: got {len(cotangents)}, one for each of the {len(data)} datums is needed"]
        )
    plain = [torch.as_tensor(c).detach().cpu() for c in cotangents]
    shapes = [ScoreRequest.of(datum).targets.shape for datum in data]
    problems = [_problem(c, shape) for c, shape in zip(plain, shapes, strict=True)]
    if any(problems):
        raise InvalidDatumsError([f"datum {i}: {words}" for i, words in enumerate(problems) if words])
    return GivenCotangents(plain)


def _problem(cotangent: Tensor, shape: torch.Size) -> str:
    if not cotangent.is_floating_point() or cotangent.shape != shape:
        return f"its cotangent is {cotangent.dtype} {list(cotangent.shape)}, not a float of the targets' shape {list(shape)}"
    bad = (~torch.isfinite(cotangent)).nonzero()
    return f"its cotangent at target token {int(bad[0, 0])} is {cotangent[tuple(bad[0])].item()}" if len(bad) else ""
