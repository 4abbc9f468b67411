"""How exact a backend is: measured and reported, and held to no bound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from ....backends.protocol import TrainerBackend
from ...under_test import BackendUnderTest, closing
from ..actions import descent, scores, train
from ..check import Evidence, NotApplicable, check, require

__all__ = ["PRECISION"]

_LARGER: Final = 25  # about half a nat, which half precision shows


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
            _against(under_test, name, make, evidence)


@check("parameters that are left out of training, or another start than the reference has")
def updates_match_the_reference(under_test: BackendUnderTest, evidence: Evidence) -> None:
    """The update of a step is that of a reference which trains the same parameters from the same start."""
    if under_test.reference is None or not under_test.reference_trains:
        raise NotApplicable("no reference was given that trains")
    for loss in ("cross_entropy", "ppo", "dpo"):
        script = train(descent(under_test, loss), [under_test.data()], loss)
        with closing(under_test.reference()) as reference:
            script(reference)
            expected = under_test.probe(reference)
        found = under_test.after(script)
        evidence.note(**{loss: under_test.require_same(f"{loss}, against the reference", expected, found)})


def _against(under_test: BackendUnderTest, name: str, make: Callable[[], TrainerBackend], evidence: Evidence) -> None:
    assert under_test.reference is not None, "see the caller"
    small = descent(under_test)
    params = replace(small, learning_rate=_LARGER * small.learning_rate)
    with closing(under_test.reference()) as reference, closing(make()) as backend:
        before = [_scored(one, under_test) for one in (reference, backend)]
        error = (before[0] - before[1]).abs()
        evidence.note(**{f"{name}: log-probs, largest, nats": float(error.max())})
        evidence.note(**{f"{name}: log-probs, mean, nats": float(error.mean())})
        if not under_test.reference_trains:
            return
        for one in (reference, backend):
            train(params, [under_test.data()])(one)
        moved, found = (_scored(one, under_test) - was for one, was in zip((reference, backend), before, strict=True))
    evidence.note(**{f"{name}: update, relative": float((moved - found).norm() / moved.norm())})


def _scored(backend: Any, under_test: BackendUnderTest) -> Tensor:
    return torch.cat([x.double() for x in scores(backend, under_test.data())])


PRECISION: Final = (updates_match_the_reference, precision_is_measured)
