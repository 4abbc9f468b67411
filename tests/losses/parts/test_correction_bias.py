"""The bias of corrections, by enumeration of all sequences of a small autoregressive policy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pullback.losses import Correction, TokenBatch
from pullback.losses.parts.correction import Level


def exact(weigh: Callable[[Tensor, Tensor], Tensor], length: int) -> tuple[Tensor, Tensor, Tensor]:
    """E_q[w f] and E_old[f] of a function f of sequences of a small vocabulary, and q, rho and f of each.

    The policies are autoregressive: the logits of a token depend on the one before.
    """
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
    log_old, log_q = logits.log_softmax(-1)
    value = torch.randn(3**length, generator=generator, dtype=torch.float64)
    rows = list(itertools.product(range(3), repeat=length))
    log = {
        name: torch.stack([
            torch.stack([table[3 if t == 0 else row[t - 1], row[t]] for t in range(length)]) for row in rows
        ])
        for name, table in (("old", log_old), ("q", log_q))
    }  # fmt: skip
    weight = weigh(log["old"], log["q"])
    prob_q, prob_old = log["q"].sum(1).exp(), log["old"].sum(1).exp()
    assert math.isclose(float(prob_q.sum()), 1.0, rel_tol=1e-12)
    sampled = (prob_q * weight * value).sum()
    old = (prob_old * value).sum()
    rho = (log["old"] - log["q"]).sum(1).exp()
    return sampled, old, torch.stack([prob_q, rho, value])


def weight_at(correction: Correction) -> Callable[[Tensor, Tensor], Tensor]:
    """The weight that a correction gives to the last token of every row."""

    def weigh(old: Tensor, q: Tensor) -> Tensor:
        batch = TokenBatch.from_padded(old, torch.ones_like(old), old_logprobs=old, rollout_logprobs=q)
        return correction.factor(batch).expand(old.shape)[:, -1]

    return weigh


@pytest.mark.parametrize("length", [1, 3])
def test_bias_by_enumeration(length: int) -> None:
    """Over all sequences: the product is unbiased; truncation and masks have exactly the bias that is documented."""
    found, wanted, _ = exact(weight_at(Correction.tis(math.inf, level="sequence")), length)
    assert math.isclose(float(found), float(wanted), rel_tol=1e-12)
    high = 1.2
    found, wanted, (q, rho, f) = exact(weight_at(Correction.tis(high, level="sequence")), length)
    bias = -(q * (rho - high).relu() * f).sum()
    assert abs(float(bias)) > 1e-3
    assert math.isclose(float(found - wanted), float(bias), rel_tol=1e-10)
    masked = Correction.masked(0.8, high, level="sequence")
    found, wanted, (q, rho, f) = exact(weight_at(masked), length)
    bias = -(q * rho * f * ((rho < 0.8) | (rho > high))).sum()
    assert abs(float(bias)) > 1e-3
    assert math.isclose(float(found - wanted), float(bias), rel_tol=1e-10)


def test_weights_of_tokens_do_not_correct_prefixes() -> None:
    """Negative control: untruncated token weights and geometric means are biased on sequences, though not on one token."""
    levels: tuple[Level, ...] = ("token", "geometric")
    for level in levels:
        correction = Correction.tis(math.inf, level=level)
        found, wanted, _ = exact(weight_at(correction), 3)
        assert abs(float(found - wanted)) > 1e-2
        found, wanted, _ = exact(weight_at(correction), 1)
        assert math.isclose(float(found), float(wanted), rel_tol=1e-12)
