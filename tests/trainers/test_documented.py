"""prime-rl's and rllm's losses, by their documented signatures: what their trainers do with the result is written out here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from prime_rl_loss import grpo
from rllm_loss import pullback_grpo
from torch import Tensor

from pullback.losses import GRPO, ClipRange, TokenBatch

LENGTHS = (2, 3, 4, 6, 12, 20, 30, 40)


@dataclass
class LossInputs:
    """Of prime-rl, docs/algorithms.md at 559b447."""

    trainer_logprobs: Tensor
    inference_logprobs: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    loss_mask: Tensor
    loss_weights: Tensor | None = None


@dataclass
class LossContext:
    """Of rllm, rllm/trainer/algorithms/loss.py; what the example reads of it."""

    logp_curr: Tensor
    logp_old: Tensor
    advantages: Tensor
    action_mask: Tensor
    aggregate: Any
    params: dict[str, Any] = field(default_factory=lambda: {"eps_clip": 0.2, "eps_clip_high": 0.28})


def columns(poison: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, the sampler's, advantages and the mask, [B, T]; the last two tokens of each sequence are not trained."""
    generator = torch.Generator().manual_seed(0)
    length = max(LENGTHS) + 2
    mask = torch.arange(length) < torch.tensor(LENGTHS)[:, None]
    logprobs = -3 * torch.rand(mask.shape, generator=generator, dtype=torch.float64)
    old = (logprobs + 0.4 * torch.randn(mask.shape, generator=generator, dtype=torch.float64)).clamp(max=0)
    advantages = torch.randn(mask.shape, generator=generator, dtype=torch.float64)
    return logprobs.requires_grad_(), torch.where(mask, old, poison), advantages, mask


def slopes(value: Tensor, logprobs: Tensor) -> Tensor:
    return torch.autograd.grad(value, logprobs)[0]


def plain(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """The clipped surrogate over the tokens of the step, written out."""
    ratio = (logprobs - old)[mask].exp()
    gain = torch.minimum(ratio * advantages[mask], ratio.clamp(0.8, 1.28) * advantages[mask])
    return -gain.sum() / mask.sum()


@pytest.mark.parametrize("micro", [8, 2])
def test_prime_rl(micro: int) -> None:
    """Sequence by sequence, summed and divided by the tokens of the global batch, in one micro-batch and in four."""
    logprobs, old, advantages, mask = columns()
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, 8, micro):
        outputs = [
            grpo(LossInputs(logprobs[i, : n + 2], old[i, : n + 2], None, advantages[i, : n + 2], mask[i, : n + 2]))
            for i, n in list(enumerate(LENGTHS))[start : start + micro]
        ]
        total = total + torch.stack([output.loss for output in outputs]).sum() / mask.sum()
    exact = slopes(plain(logprobs, old, advantages, mask), logprobs)
    assert torch.allclose(slopes(total, logprobs), exact, rtol=1e-10, atol=1e-14)


def test_a_mean_would_be_divided_twice() -> None:
    """The control, for sequences of 12 tokens: a mean inside is 12 times too small."""
    logprobs, old, advantages, _ = columns()
    one = {"weights": torch.ones(1, 12), "advantages": advantages[4:5, :12], "rollout_logprobs": old[4:5, :12]}
    leaf = logprobs[4:5, :12]
    found = [
        slopes(
            GRPO(ClipRange(0.8, 1.28), aggregation=name).evaluate(TokenBatch.from_padded(leaf, **one)).loss, logprobs
        )
        for name in ("sum", "token_mean")
    ]
    assert torch.allclose(found[0], 12 * found[1])


def test_prime_rl_weighs_tokens() -> None:
    """``loss_weights`` scale a token's loss, and 0 takes it out."""
    logprobs, old, advantages, mask = columns()
    weights = torch.linspace(0, 2, mask.shape[1], dtype=torch.float64)
    inputs = LossInputs(logprobs[7], old[7], None, advantages[7], mask[7], weights)
    found = slopes(grpo(inputs).loss, logprobs)[7]
    alone = slopes(grpo(LossInputs(logprobs[7], old[7], None, advantages[7], mask[7])).loss, logprobs)[7]
    assert torch.allclose(found, weights * alone)


@pytest.mark.parametrize("micro", [8, 2])
def test_rllm(micro: int) -> None:
    """With verl's aggregation over the global batch; a token that is not trained may hold anything."""
    logprobs, old, advantages, mask = columns(poison=float("nan"))

    def aggregate(values: Tensor, part: Tensor) -> Tensor:
        return (values * part).sum() / mask.sum()  # as it is there: a mask that multiplies

    total = torch.zeros((), dtype=torch.float64)
    for i in range(0, 8, micro):
        at = slice(i, i + micro)
        context = LossContext(logprobs[at], old[at], advantages[at], mask[at].double(), aggregate)
        total = total + pullback_grpo(context)[0]
    exact = slopes(plain(logprobs, old, advantages, mask), logprobs)
    assert torch.allclose(slopes(total, logprobs), exact, rtol=1e-10, atol=1e-14)
