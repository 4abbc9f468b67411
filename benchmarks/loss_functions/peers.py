"""Other libraries' own loss functions on the same tensors.

Trainers' methods are called as they are, on a stand-in for the trainer whose forward pass returns the given log-probs;
what they log on the way is therefore part of their time. Libraries are imported only when asked for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from . import hand_written
from .hand_written import Inputs

__all__ = ["Peer", "available"]

Hand = Callable[[Tensor, Inputs], Tensor]
Objective = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Peer:
    """A function of another library.

    Attributes:
        name: the library and what is called.
        prepare: returns the loss as a function of the log-probs; what it computes before that is not timed.
        order: returns the log-probs with their sequences in the order that the function wants.
    """

    name: str
    prepare: Callable[[Inputs], Objective]
    order: Callable[[Tensor], Tensor] = lambda x: x


def available() -> dict[Hand, list[Peer]]:
    """Return the functions of all installed libraries by the hand-written loss they stand beside; name the others."""
    found: dict[Hand, list[Peer]] = defaultdict(list)
    for collect, install in (
        (_torchrl, "pip install torchrl"),
        (_trl, "pip install -e '.[peers]'"),
        (_verl, "pip install --no-deps verl && pip install codetiming omegaconf ray tensordict transformers"),
    ):
        try:
            for hand, peer in collect():
                found[hand].append(peer)
        except ImportError as error:
            print(f"{collect.__name__[1:]} is left out ({error}): {install}, in a virtual environment of its own")
    return found


def chosen_first(x: Tensor) -> Tensor:
    """Return pairs of neighbours as all chosen sequences, then all rejected ones."""
    return torch.cat([x[0::2], x[1::2]])


def _verl() -> list[tuple[Hand, Peer]]:
    from verl.trainer.ppo import core_algos

    class Config(SimpleNamespace):
        """What the function asks of its actor's configuration."""

        def get(self, name: str, default: Any = None) -> Any:
            return getattr(self, name, default)

    config = Config(clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.2, global_batch_info={})

    def likelihood(mode: str) -> Callable[[Inputs], Objective]:
        def prepare(given: Inputs) -> Objective:
            def objective(x: Tensor) -> Tensor:
                loss: Tensor = core_algos.agg_loss(-x, given.mask, mode)
                return loss

            return objective

        return prepare

    def policy(mode: str, beta: float) -> Callable[[Inputs], Objective]:
        def prepare(given: Inputs) -> Objective:
            advantages = given.advantages[:, None].expand_as(given.mask).contiguous()

            def objective(x: Tensor) -> Tensor:
                loss: Tensor
                loss, _ = core_algos.compute_policy_loss_vanilla(
                    given.rollout_logprobs, x, advantages, given.mask, mode, config
                )
                if beta:
                    penalty = core_algos.kl_penalty(x, given.ref_logprobs, "k3")
                    loss = loss + beta * core_algos.agg_loss(penalty, given.mask, mode)
                return loss

            return objective

        return prepare

    vanilla = "verl compute_policy_loss_vanilla"
    return [
        (hand_written.cross_entropy_mean, Peer("verl agg_loss(-logprobs), token-mean", likelihood("token-mean"))),
        (hand_written.cross_entropy_sum, Peer("verl agg_loss(-logprobs), token-sum", likelihood("token-sum"))),
        (hand_written.ppo, Peer(f"{vanilla}, token-sum", policy("token-sum", 0.0))),
        (hand_written.grpo, Peer(f"{vanilla} + kl_penalty k3", policy("token-mean", hand_written.BETA_KL))),
    ]


def _torchrl() -> list[tuple[Hand, Peer]]:
    from tensordict import TensorDict
    from torchrl.objectives.llm.grpo import GRPOLoss
    from torchrl.objectives.llm.sft import sft_loss

    def policy(aggregation: str, beta: float | None) -> Callable[[Inputs], Objective]:
        def prepare(given: Inputs) -> Objective:
            module: Any = GRPOLoss(
                torch.nn.Identity(),
                clip_epsilon=0.2,
                kl_to_ref_coeff=beta,
                entropy_bonus=False,
                aggregation=aggregation,
            )
            keys = module.tensor_keys
            data = TensorDict(
                {
                    keys.action: torch.zeros(given.mask.shape, dtype=torch.int64),
                    keys.sample_log_prob: given.rollout_logprobs,
                    keys.ref_log_probs: given.ref_logprobs,
                    keys.advantage: given.advantages[:, None, None].expand(*given.mask.shape, 1).contiguous(),
                },
                batch_size=given.mask.shape[:1],
            )
            distribution = SimpleNamespace(mask=given.mask.bool())

            def objective(x: Tensor) -> Tensor:
                module._get_cur_log_prob = lambda _: (x, distribution, False)
                output = module(data)
                loss: Tensor = output.loss_objective.sum()
                return loss if beta is None else loss + output.loss_kl_to_ref

            return objective

        return prepare

    def likelihood(given: Inputs) -> Objective:
        return lambda x: sft_loss((x * given.mask).sum(1), "sum")

    return [
        (hand_written.cross_entropy_sum, Peer("torchrl sft_loss of hand-written sums", likelihood)),
        (hand_written.ppo, Peer("torchrl GRPOLoss.forward, aggregation none, summed", policy("none", None))),
        (
            hand_written.grpo,
            Peer("torchrl GRPOLoss.forward, KL over padding too", policy("token_mean", hand_written.BETA_KL)),
        ),
    ]


def _trl() -> list[tuple[Hand, Peer]]:
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    def orpo(given: Inputs) -> Objective:
        trainer = _trainer(beta=hand_written.LAMBDA_ORPO)
        mask = chosen_first(given.mask)

        def objective(x: Tensor) -> Tensor:
            chosen, rejected = ((x * mask).sum(1) / mask.sum(1)).chunk(2)
            odds: Tensor = ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)[0]
            return (-chosen - odds).mean()

        return objective

    return [
        (hand_written.ppo, Peer("TRL GRPOTrainer._compute_loss, beta 0, sum", lambda given: _trl_grpo(given, 0.0))),
        (
            hand_written.grpo,
            Peer("TRL GRPOTrainer._compute_loss, dapo", lambda given: _trl_grpo(given, hand_written.BETA_KL)),
        ),
        (hand_written.dpo, Peer("TRL DPOTrainer._compute_loss, reference summed before", _trl_dpo, chosen_first)),
        (hand_written.orpo, Peer("TRL ORPOTrainer.odds_ratio_loss of hand-written means", orpo, chosen_first)),
    ]


def _trainer(**attributes: Any) -> Any:
    """Make a stand-in with what TRL's methods ask of a trainer beside their settings."""

    def same(x: Tensor, **_: Any) -> Tensor:
        return x

    accelerator = SimpleNamespace(
        num_processes=1, device=torch.device("cpu"), gather=same, gather_for_metrics=same, reduce=same
    )
    return SimpleNamespace(
        model=SimpleNamespace(training=True),
        _metrics=defaultdict(lambda: defaultdict(list)),
        accelerator=accelerator,
        aux_loss_enabled=False,
        **attributes,
    )


def _trl_grpo(given: Inputs, beta: float) -> Objective:
    """TRL's dapo divides by a given number of tokens, so that 1 gives the sum."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    trainer = _trainer(
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=beta,
        loss_type="dapo",
        epsilon_low=0.2,
        epsilon_high=0.2,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        _entropy_bonus_enabled=False,
    )
    one = torch.ones(len(given.mask), 1, dtype=torch.int64)
    entropies = torch.zeros_like(given.mask)
    inputs = {
        "prompt_ids": one,
        "prompt_mask": one,
        "completion_ids": torch.ones(given.mask.shape, dtype=torch.int64),
        "completion_mask": given.mask,
        "advantages": given.advantages,
        "old_per_token_logps": given.rollout_logprobs,
        "ref_per_token_logps": given.ref_logprobs,
        "num_items_in_batch": given.mask.sum() if beta else torch.ones(()),
    }

    def objective(x: Tensor) -> Tensor:
        trainer._get_per_token_logps_and_entropies = lambda *_, **__: (x, entropies, None)
        loss: Tensor = GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
        return loss

    return objective


def _trl_dpo(given: Inputs) -> Objective:
    from trl.trainer.dpo_trainer import DPOTrainer

    trainer = _trainer(
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        beta=hand_written.BETA_DPO,
        use_weighting=False,
        label_smoothing=0.0,
        _total_train_tokens=0,
        _tp_size=1,
    )
    mask = chosen_first(given.mask)
    chosen, rejected = (chosen_first(given.ref_logprobs) * mask).sum(1).chunk(2)
    nothing = torch.zeros_like(mask)
    ids = torch.ones(len(mask), mask.shape[1] + 1, dtype=torch.int64)
    inputs = {
        "input_ids": ids,
        "attention_mask": ids,
        "completion_mask": torch.cat([torch.zeros(len(mask), 1), mask], 1),
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }

    def objective(x: Tensor) -> Tensor:
        outputs = SimpleNamespace(log_probs=x * mask, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())
        loss: Tensor = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
        return loss

    return objective
