"""How exact a backend is: measured and reported, and held to no bound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from ...backends.protocol import TrainerBackend
from ..under_test import BackendUnderTest, closing
from .actions import descent, scores, train
from .check import Evidence, check, require

__all__ = ["PRECISION"]


@check("NaN or inf in the log-probs")
def precision_is_measured(under_test: BackendUnderTest, evidence: Evidence) -> None:
    """The table of precision: how far log-probs and updates are from an fp64 reference, or from themselves in other company."""
    variants = under_test.variants or {"log-probs": under_test.make}
    for name, make in variants.items():
        with closing(make()) as backend:
            found = _scored(backend, under_test)
            require(bool(found.isfinite().all()), f"{name}: log-probs are not finite")
            alone = torch.cat([scores(backend, [datum])[0].double() for datum in under_test.data()])
        evidence.note(**{f"{name}: alone against together, nats": float((found - alone).abs().max())})
        evidence.note(
            **{f"{name}: are bfloat16 numbers": "yes" if torch.equal(found.bfloat16().double(), found) else "no"}
        )
        if under_test.reference is not None:
            _against(under_test, under_test.reference, name, make, evidence)


def _against(
    under_test: BackendUnderTest,
    exact: Callable[[], Any],
    name: str,
    make: Callable[[], TrainerBackend],
    evidence: Evidence,
) -> None:
    params = descent(under_test)
    with closing(exact()) as reference, closing(make()) as backend:
        before = [_scored(one, under_test) for one in (reference, backend)]
        error = (before[0] - before[1]).abs()
        evidence.note(
            **{
                f"{name}: log-probs, largest, nats": float(error.max()),
                f"{name}: log-probs, mean, nats": float(error.mean()),
            }
        )
        if not hasattr(reference, "optim_step"):
            return
        for one in (reference, backend):
            train(params, [under_test.data()])(one)
        moved, found = (_scored(one, under_test) - was for one, was in zip((reference, backend), before, strict=True))
    evidence.note(**{f"{name}: update, relative": float((moved - found).norm() / moved.norm())})


def _scored(backend: Any, under_test: BackendUnderTest) -> Tensor:
    return torch.cat([x.double() for x in scores(backend, under_test.data())])


PRECISION: Final = (precision_is_measured,)
