"""verl's registry of policy losses with ours: through verl's own `ppo_loss`, the gradient of its vanilla loss; and the trap."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from other_trainers.trainer_checks import TOLERANCE, error
from torch import Tensor

from pullback.errors import ConfigError
from pullback.losses import TokenBatch, preset

REASON = "needs verl: make trainers TRAINERS=verl"
core_algos = pytest.importorskip("verl.trainer.ppo.core_algos", reason=REASON)
import verl_loss  # noqa: E402, F401  # registers
from verl.workers.config import ActorConfig  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of verl, and of what it imports
LENGTHS = (2, 3, 4, 6, 12, 20, 30, 40)
MODES = {
    "token-mean": "batch_num_tokens",
    "seq-mean-token-sum": "global_batch_size",
    "seq-mean-token-mean": "global_batch_size",
}


def columns() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).float()
    log_prob = -3 * torch.rand(mask.shape, generator=generator)
    old = log_prob + 0.4 * torch.randn(mask.shape, generator=generator)
    advantages = torch.randn(len(LENGTHS), 1, generator=generator).expand(mask.shape)
    return {"log_prob": log_prob, "old_log_prob": old.clamp(max=0), "advantages": advantages, "response_mask": mask}


def gradient(name: str, steps: int, mode: str, dp_size: int = 1, known: bool = True) -> Tensor:
    """The sum over the micro-batches of d loss / d log_prob, as verl calls a policy loss."""
    data = columns()
    totals = {"batch_num_tokens": int(data["response_mask"].sum()), "global_batch_size": len(LENGTHS)}
    config = ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=2, clip_ratio=0.2, use_dynamic_bsz=False
    )
    config.global_batch_info.update(dp_size=dp_size, loss_scale_factor=None, **(totals if known else {}))
    leaf = data.pop("log_prob").requires_grad_()
    size = len(LENGTHS) // steps
    for i in range(0, len(LENGTHS), size):
        part = {key: value[i : i + size] for key, value in data.items()}
        loss, metrics = core_algos.get_policy_loss_fn(name)(
            log_prob=leaf[i : i + size], loss_agg_mode=mode, config=config, **part
        )
        assert metrics
        torch.autograd.backward(loss)
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("dp_size", [1, 2])
def test_grpo(mode: str, steps: int, dp_size: int) -> None:
    """Clipped, dual-clipped and not: the slopes of verl's vanilla loss over the global batch."""
    ours, theirs = (gradient(name, steps, mode, dp_size) for name in ("pullback_grpo", "vanilla"))
    assert theirs.norm() > 0
    assert error(ours, theirs) < TOLERANCE[torch.float32]
    assert error(ours, gradient("vanilla", 1, mode, dp_size)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("mode", MODES)
def test_a_count_that_is_not_there_is_asked_for(mode: str) -> None:
    """The control: verl's own falls back to the micro-batch, and its slopes are then others."""
    assert error(gradient("vanilla", 4, mode, known=False), gradient("vanilla", 4, mode)) > 1.0
    with pytest.raises(ConfigError, match="of verl"):
        gradient("pullback_grpo", 4, mode, known=False)


def test_the_factor() -> None:
    """Four responses of one length each their own micro-batch: four times the slopes."""
    mask, log_prob = torch.ones(4, 5), torch.full((4, 5), -1.0, requires_grad=True)
    given: dict[str, Any] = {"advantages": torch.ones(4), "rollout_logprobs": torch.full((4, 5), -1.0)}
    loss = preset("verl:vanilla")
    whole = loss.evaluate(TokenBatch.from_padded(log_prob, mask, **given)).loss
    (exact,) = torch.autograd.grad(whole, log_prob)
    parts = [
        loss.evaluate(
            TokenBatch.from_padded(log_prob[i : i + 1], mask[:1], **{k: v[i : i + 1] for k, v in given.items()})
        ).loss
        for i in range(4)
    ]
    (naive,) = torch.autograd.grad(torch.stack(parts).sum(), log_prob)
    assert error(naive, 4 * exact) < 1e-6
