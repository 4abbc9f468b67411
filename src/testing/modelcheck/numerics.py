"""How far a model's log-probs are from fp64, by dtype: `selected_logprobs` beside the textbook formula."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from ...backends.calls.requests import ScoreRequest
from ...backends.native.causal_lm import CausalLM
from ...backends.native.execution.forward import needed_hidden, score
from ...datums.types import Datum
from ...ops.head import Head
from ...ops.logprobs import selected_logprobs

__all__ = ["NumericsRow", "head_numerics", "model_numerics"]


@final
@dataclass(frozen=True)
class NumericsRow:
    """Absolute differences of log-probs from fp64, nats.

    Attributes:
        what: e.g. ``head, bfloat16, selected_logprobs``.
        largest, p99, mean: of the differences.
    """

    what: str
    largest: float
    p99: float
    mean: float

    @classmethod
    def of(cls, what: str, logprobs: Tensor, exact: Tensor) -> NumericsRow:
        """Compare log-probs with exact ones."""
        difference = (logprobs.double() - exact.double()).abs().flatten()
        return cls(what, *(float(x) for x in (difference.max(), difference.quantile(0.99), difference.mean())))


@torch.no_grad()
def head_numerics(hidden: Tensor, head: Head, targets: Tensor, dtypes: Sequence[torch.dtype]) -> list[NumericsRow]:
    """Compare `selected_logprobs` and plain ``log_softmax`` with fp64, in each dtype.

    Hidden states and weight are rounded to the dtype first, so that fp64 sees the same numbers.

    Args:
        hidden: [N, H], of a real model.
        head: its head.
        targets: int64 [N].
        dtypes: to compare.
    """
    rows = []
    for dtype in dtypes:
        h, rounded = hidden.to(dtype), head._replace(weight=head.weight.to(dtype))
        exact = selected_logprobs(h.double(), rounded._replace(weight=rounded.weight.double()), targets)
        plain = torch.log_softmax((h @ rounded.weight.T).float() * head.scale, -1).gather(-1, targets[:, None])[:, 0]
        name = str(dtype).removeprefix("torch.")
        rows.append(NumericsRow.of(f"head, {name}, selected_logprobs", selected_logprobs(h, rounded, targets), exact))
        rows.append(NumericsRow.of(f"head, {name}, log_softmax", plain, exact))
    return rows


@torch.no_grad()
def model_numerics(exact: CausalLM, others: dict[str, Any], data: Sequence[Datum]) -> list[NumericsRow]:
    """Compare whole models with one in fp64.

    Args:
        exact: the model in fp64.
        others: name -> the same model in another dtype, or a function of score requests that returns all log-probs.
        data: datums.
    """
    requests = [ScoreRequest.of(datum) for datum in data]
    expected = score(exact, requests, "single")
    rows = []
    for name, model in others.items():
        logprobs = score(model, requests, "single") if isinstance(model, CausalLM) else model(requests)
        rows.append(NumericsRow.of(name, logprobs, expected))
    return rows


def hidden_of(model: CausalLM, data: Sequence[Datum]) -> tuple[Tensor, Tensor]:
    """Return the hidden states and targets of all positions, [N, H] and [N]."""
    requests = [ScoreRequest.of(datum) for datum in data]
    with torch.no_grad():
        return needed_hidden(model, requests, "single"), torch.cat([r.targets for r in requests])
