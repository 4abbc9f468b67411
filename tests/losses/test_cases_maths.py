"""Cases that once gave a wrong number in silence: each gives the right one, or a clear refusal."""

from __future__ import annotations

import pytest
import torch

from pullback.losses import GRPO, KL, ORPO, TokenBatch


@pytest.mark.parametrize("candidates", [4, 3])
def test_orpo_of_soft_targets(candidates: int) -> None:
    """The NLL of the chosen answers has the chosen answers' weights, whether or not N and K are equal."""
    generator = torch.Generator().manual_seed(0)
    logprobs = (-torch.rand(4, candidates, generator=generator, dtype=torch.double) - 0.1).requires_grad_()
    weights = torch.rand(4, candidates, generator=generator, dtype=torch.double)
    batch = TokenBatch.from_packed(logprobs, [2, 2], weights=weights)
    loss = ORPO(lam=0.0, nll="token_mean").evaluate(batch).loss
    expected = -(weights[:2] * logprobs[:2]).sum() / 2
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0.0)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert not bool(gradient[2:].any())


@pytest.mark.parametrize("anchored", [False, True], ids=["sampler only", "with old_logprobs"])
def test_importance_of_the_kl_is_the_samplers(anchored: bool) -> None:
    """By enumeration over a vocabulary, the gradient is that of the reverse KL, whatever the clipped ratio's anchor."""
    generator = torch.Generator().manual_seed(0)

    def policy() -> torch.Tensor:
        return torch.randn(7, generator=generator, dtype=torch.double)

    theta = policy().requires_grad_()
    logprobs = theta.log_softmax(-1)
    ref, sampler, old = (policy().log_softmax(-1) for _ in range(3))
    (expected,) = torch.autograd.grad((logprobs.exp() * (logprobs - ref)).sum(), theta, retain_graph=True)

    def gradient(kl: KL) -> torch.Tensor:
        batch = TokenBatch.from_packed(
            logprobs,
            [1] * 7,
            weights=sampler.exp(),
            advantages=torch.zeros(7, dtype=torch.double),
            rollout_logprobs=sampler,
            ref_logprobs=ref,
            old_logprobs=old if anchored else None,
        )
        loss = GRPO(clip=None, kl=kl, aggregation="sum").evaluate(batch).loss
        return torch.autograd.grad(loss, theta, retain_graph=True)[0]

    torch.testing.assert_close(gradient(KL("k3", 1.0)), expected, rtol=1e-12, atol=1e-14)
    by_anchor = gradient(KL("k3", 1.0, importance="anchor", acknowledge_biased=True))
    assert anchored != torch.allclose(by_anchor, expected, atol=1e-3)
