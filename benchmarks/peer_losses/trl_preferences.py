"""TRL's losses of pairs: the methods of its DPO, ORPO and CPO trainers, on stand-ins for the trainers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any, Final

import torch
from torch import Tensor

from .trl_policies import one_process
from .wrapped import Setting, Wrapped, interleaved, selected, two_token_logits

__all__ = ["TRL_PREFERENCES", "TRL_SETTINGS"]

_DPO: Final = "trl.trainer.dpo_trainer.DPOTrainer._compute_loss"
_EXPERIMENTAL: Final = "trl.experimental"
_PAIRS: Final = {"form": "padded", "kind": "pair"}


def dpo(kind: str = "sigmoid", **settings: Any) -> Callable[..., Tensor]:
    """Return a loss of `DPOTrainer`; its head gives 0 where the completion mask is 0."""
    smoothing = settings.pop("label_smoothing", 0.0)

    def loss(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
        trainer_class = import_module("trl.trainer.dpo_trainer").DPOTrainer
        policy, reference, completion = (
            interleaved(x) for x in (selected(logprobs, mask), selected(ref_logprobs, mask), mask.long())
        )
        chosen, rejected = reference.sum(1).chunk(2)
        nothing = torch.zeros_like(policy)
        outputs = SimpleNamespace(
            log_probs=policy, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool(), log_sum_sq_probs=nothing
        )
        trainer = _dpo_trainer(kind, smoothing, settings)
        ids = torch.ones(completion.shape[0], completion.shape[1] + 1, dtype=torch.int64)
        inputs = {
            "input_ids": ids,
            "attention_mask": ids,
            "completion_mask": torch.cat([torch.zeros_like(completion[:, :1]), completion], 1),
            "ref_chosen_logps": chosen,
            "ref_rejected_logps": rejected,
        }
        result: Tensor = trainer_class._compute_loss(trainer, lambda **_: outputs, inputs, False)
        return result

    return loss


def _dpo_trainer(kind: str, smoothing: float, settings: dict[str, Any]) -> SimpleNamespace:
    defaults = {"beta": 0.1, "use_weighting": False, "ld_alpha": None, "f_divergence_type": "reverse_kl"}
    return SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=one_process(),
        args=SimpleNamespace(discopop_tau=0.05),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        loss_types=[kind],
        loss_weights=[1.0],
        label_smoothing=smoothing,
        **{**defaults, **settings},
    )


def of_logits(module: str, trainer: str, method: str, **settings: Any) -> Callable[..., Tensor]:
    """Return a loss of a trainer that makes its own log-probs of logits; the mask is in its labels."""

    def loss(logprobs: Tensor, mask: Tensor, attention_mask: Tensor) -> Tensor:
        trainer_class = getattr(import_module(f"{_EXPERIMENTAL}.{module}"), trainer)
        logits = interleaved(two_token_logits(logprobs, attention_mask)).float()  # as ORPO does at once
        # the logits of a position are those of the token after it: one more position, and a first token
        logits = torch.cat([logits, torch.zeros_like(logits[:, :1])], 1)
        stand_in = SimpleNamespace(
            accelerator=one_process(),
            is_encoder_decoder=False,
            padding_value=0,
            pad_token_id=0,
            aux_loss_enabled=False,
            concatenated_inputs=trainer_class.concatenated_inputs,
            get_batch_logps=trainer_class.get_batch_logps,
            **settings,
        )
        for name in ("concatenated_forward", method):
            setattr(stand_in, name, partial(getattr(trainer_class, name), stand_in))
        batch = _batch(mask, attention_mask)
        result, _ = trainer_class.get_batch_loss_metrics(
            stand_in, lambda *_, **__: SimpleNamespace(logits=logits), batch, "train"
        )
        return result  # type: ignore[no-any-return]

    return loss


def odds_ratio(chosen_logps: Tensor, rejected_logps: Tensor) -> Tensor:
    """The odds-ratio part of ORPO's loss, of mean log-probs; the trainer subtracts it."""
    trainer = import_module(f"{_EXPERIMENTAL}.orpo.orpo_trainer").ORPOTrainer
    stand_in = SimpleNamespace(beta=0.1, accelerator=one_process())
    return -trainer.odds_ratio_loss(stand_in, chosen_logps, rejected_logps)[0]  # type: ignore[no-any-return]


def _batch(mask: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
    """Return ids, masks and labels of both sides; the token that counts is 0."""
    first = torch.zeros(mask.shape[0], 1, dtype=torch.int64)
    labels = torch.cat([first - 100, torch.where(mask != 0, 0, -100)], 1)
    attended = torch.cat([first + 1, attention_mask.long()], 1)
    columns = {"input_ids": torch.zeros_like(labels), "attention_mask": attended, "labels": labels}
    return {
        f"{side}_{name}": rows[start::2]
        for name, rows in columns.items()
        for start, side in ((0, "chosen"), (1, "rejected"))
    }


def _pair(kind: str, name: str | None = None, **settings: Any) -> Wrapped:
    return Wrapped("TRL", name or f"dpo, {kind}", _DPO, partial(dpo, kind, **settings), _PAIRS)


_CPO = partial(
    of_logits,
    "cpo.cpo_trainer",
    "CPOTrainer",
    "cpo_loss",
    label_smoothing=0.0,
    alpha=0.0,
    cpo_alpha=1.0,
    simpo_gamma=0.5,
)
_CPO_PLACE: Final = f"{_EXPERIMENTAL}.cpo.cpo_trainer.CPOTrainer.get_batch_loss_metrics"

TRL_PREFERENCES: Final = (
    _pair("sigmoid"),
    _pair("hinge"),
    _pair("ipo"),
    _pair("exo_pair", label_smoothing=1e-3),
    _pair("nca_pair"),
    _pair("robust", label_smoothing=0.1),
    _pair("bco_pair"),
    _pair("sppo_hard"),
    _pair("aot"),
    _pair("aot_unpaired"),
    _pair("apo_zero"),
    _pair("apo_down"),
    _pair("discopop"),
    _pair("sft"),
    _pair("sigmoid_norm", beta=2.0),
    _pair("sigmoid", "dpo, sigmoid, forward_kl", f_divergence_type="forward_kl"),
    _pair("sigmoid", "dpo, sigmoid, js_divergence", f_divergence_type="js_divergence"),
    _pair("sigmoid", "dpo, sigmoid, use_weighting (WPO)", use_weighting=True),
    _pair("hinge", "dpo, hinge, use_weighting (WPO)", use_weighting=True),
    _pair("sft", "dpo, sft, use_weighting (WPO)", use_weighting=True),
    Wrapped(
        "TRL",
        "orpo",
        f"{_EXPERIMENTAL}.orpo.orpo_trainer.ORPOTrainer.get_batch_loss_metrics",
        partial(of_logits, "orpo.orpo_trainer", "ORPOTrainer", "odds_ratio_loss", beta=0.1),
        _PAIRS,
    ),
    Wrapped(
        "TRL",
        "orpo, odds ratio alone",
        f"{_EXPERIMENTAL}.orpo.orpo_trainer.ORPOTrainer.odds_ratio_loss",
        lambda: odds_ratio,
        {"form": "trl"},
    ),
    Wrapped("TRL", "cpo", _CPO_PLACE, partial(_CPO, loss_type="sigmoid", beta=0.1), _PAIRS),
    Wrapped("TRL", "simpo", _CPO_PLACE, partial(_CPO, loss_type="simpo", beta=2.0), _PAIRS),
)
TRL_SETTINGS: Final = (
    Setting(
        "TRL",
        "dpo, sigmoid",
        _DPO,
        "label_smoothing 0.2",
        partial(dpo, "sigmoid"),
        partial(dpo, "sigmoid", label_smoothing=0.2),
        _PAIRS,
    ),
    Setting(
        "TRL",
        "dpo, robust",
        _DPO,
        "label_smoothing 0.2",
        partial(dpo, "robust"),
        partial(dpo, "robust", label_smoothing=0.2),
        _PAIRS,
    ),
)
