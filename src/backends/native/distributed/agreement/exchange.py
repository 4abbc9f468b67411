"""What ranks tell each other of the results of a call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .....errors import NonFiniteError, RanksDifferError
from .....losses.evaluation.metrics import Metric, combine_metrics
from ....calls.cotangents import Cotangents, evaluate
from ....calls.prepared import PreparedCall
from ...dtensors import local_part
from ..ranks import Ranks
from .agreement import Agreement
from .digest import datum_digest

__all__ = [
    "agreed_cotangents",
    "gather_metrics",
    "of_rank_zero",
    "require_equal",
    "require_finite_gradients",
    "require_one_loss",
    "require_same_call",
]

_SAME = {torch.float64: 1e-9, torch.float32: 1e-4}  # relative; two machines may sum in another order


def require_same_call(agreement: Agreement, call: PreparedCall, place: str) -> None:
    """Check that every rank has been given the same loss and the same data, at the same place, under the same autocast.

    Args:
        agreement: of the ranks.
        call: the call.
        place: of the call: steps of the weights, and calls since the last one, in words.

    Raises:
        RanksDifferError: names the loss, or the datum, that differs.
    """
    loss = f"{call.name} {call.described} {sorted((call.counts or {}).items())} at {place}{_autocast()}"
    agreement.meet("batch", *map(datum_digest, call.data), text=loss, text_is="loss")


def _autocast() -> str:
    """Return what `torch.autocast` computes in now, in words; nothing where there is none."""
    found = [
        f", autocast to {torch.get_autocast_dtype(kind)} on {kind}"
        for kind in ("cpu", "cuda")
        if torch.is_autocast_enabled(kind)
    ]
    return "".join(found)


def agreed_cotangents(agreement: Agreement, ranks: Ranks, call: PreparedCall, logprobs: Sequence[Tensor]) -> Cotangents:
    """Evaluate the loss of a call on all log-probs on each rank, and return rank 0's cotangents.

    Raises:
        RanksDifferError: a rank has found others.
        NonFiniteError: one is NaN or inf.
    """
    found = agreement.attempt("loss", lambda: evaluate(call, dict(enumerate(logprobs))))
    everywhere = of_rank_zero(ranks, found.by_datum)
    agreement.attempt("cotangents", lambda: require_equal(call.name, found.by_datum, everywhere))
    return replace(found, by_datum=everywhere)


def require_finite_gradients(ranks: Ranks, gradients: Mapping[str, Tensor], cause: str) -> None:
    """Check the gradients of all ranks; a maximum over them would lose a NaN, a count does not.

    Args:
        ranks: the processes.
        gradients: this one's, by parameter name.
        cause: what is to blame, in words.

    Raises:
        NonFiniteError: names the first parameter.
    """
    if not gradients:
        return
    parts = [local_part(gradient) for gradient in gradients.values()]
    largest = torch.stack([part.abs().amax() if part.numel() else part.new_zeros(()) for part in parts])
    counted = ranks.gather((~torch.isfinite(largest)).long()).sum(0)
    if int(counted.sum()):
        name = [*gradients][int(counted.nonzero()[0])]
        raise NonFiniteError(f"the gradient of {name} is not finite; first caused by {cause}; nothing has changed")


def gather_metrics(ranks: Ranks, own: Sequence[Mapping[str, Metric]]) -> dict[str, Metric]:
    """Return sums (and maxima) over ranks of metrics that all of them have under the same names."""
    combined = combine_metrics(own)
    names = sorted(combined)
    numbers = [[combined[name].numerator, combined[name].denominator] for name in names]
    every = ranks.gather(torch.tensor(numbers, dtype=torch.float64)).tolist()
    each = [
        {name: Metric(row[0], row[1], combined[name].reduction) for name, row in zip(names, rows, strict=True)}
        for rows in every
    ]
    return combine_metrics(each)


def of_rank_zero(ranks: Ranks, own: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Return the cotangents that rank 0 has found, which have the shapes of this rank's."""
    flat = torch.cat([own[i].detach().reshape(-1).cpu() for i in sorted(own)])
    apart = torch.split(ranks.broadcast(flat), [own[i].numel() for i in sorted(own)])
    return {i: each.reshape(own[i].shape) for i, each in zip(sorted(own), apart, strict=True)}


def require_equal(name: str, own: Mapping[int, Tensor], first: Mapping[int, Tensor]) -> None:
    """Check that this rank's cotangents are those of rank 0.

    Raises:
        RanksDifferError: a datum's are others.
    """
    for i, expected in sorted(first.items()):
        difference = float((own[i].cpu() - expected).norm()) / max(float(expected.norm()), 1e-30)
        if not difference <= _SAME.get(expected.dtype, 1e-4):
            raise RanksDifferError(
                f"datum {i}: {name} has another gradient here than on rank 0 (relative difference {difference:.2g}); every "
                "rank evaluates it on all log-probs, so seed what it draws, and let it read the same everywhere"
            )


def require_one_loss(name: str, alone: Mapping[int, Tensor], shared: Mapping[int, Tensor]) -> None:
    """Check that a registered loss gives on each share what it gives here on all datums.

    Args:
        name: of the loss.
        alone: the cotangents that this rank has found for all datums.
        shared: those that were used, each found by the rank that has the datum.

    Raises:
        RanksDifferError: a datum's are others.
    """
    largest = max(float(cotangent.norm()) for cotangent in alone.values())
    for i, expected in sorted(alone.items()):
        difference = float((shared[i] - expected.cpu()).norm()) / max(largest, 1e-30)
        if not difference <= _SAME.get(expected.dtype, 1e-4):
            raise RanksDifferError(
                f"datum {i}: {name} has another gradient on the rank that scores the datum than on this one (difference "
                f"{difference:.2g} of the largest); a registered loss must be the same function on every rank, and of its "
                "inputs alone: seed what it draws, and let it read the same everywhere"
            )
