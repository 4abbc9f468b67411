"""TRL's trainers with our losses: the gradients of its own losses, at 1 and 4 accumulation steps."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from other_trainers.trainer_checks import TOLERANCE, Recording, dpo, error, gradient
from toy_rows import VOCABULARY, preferences, toy_model

from pullback.backends import AdamParams, HFModel, TorchBackend
from pullback.losses import DPO

REASON = "needs TRL, in an environment of its own: make trainers TRAINERS=trl"
trl = pytest.importorskip("trl", reason=REASON)
datasets = pytest.importorskip("datasets", reason=REASON)
import transformers  # noqa: E402
import trl_dpo  # noqa: E402
import trl_foreign_model  # noqa: E402
import trl_grpo  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL, and of what it calls
LIMIT = TOLERANCE[torch.float32]
WORDS = ["?", "#", "!", *(f"w{i}" for i in range(3, VOCABULARY))]  # TRL ends a text without a space: no word has a "!"
TOKENIZER = transformers.PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w3")),
    pad_token="?",
    bos_token="#",
    eos_token="!",
)
TOKENIZER.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()


def common(folder: Path, steps: int, size: int = 8) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": size // steps,
        "gradient_accumulation_steps": steps,
        "max_steps": 2,
        "max_grad_norm": 0.0,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "lr_scheduler_type": "constant",
    }


def words(ids: list[int]) -> str:
    return " ".join(WORDS[i] for i in ids)


def dpo_gradients(trainer: type, folder: Path, steps: int, pairs: list[Any], **options: Any) -> list[torch.Tensor]:
    """What the optimizer is given in two steps on the same pairs."""
    data = [
        {"prompt": words(p["chosen"]["input_ids"][:3]), **{s: " " + words(p[s]["input_ids"][3:]) for s in p}}
        for p in pairs
    ]
    model = toy_model()
    optimizer = Recording(model.parameters(), lr=1.0)
    args = trl.DPOConfig(**common(folder, steps), beta=0.3, **options)
    trainer(
        model,
        toy_model(seed=1),
        args=args,
        train_dataset=datasets.Dataset.from_list(data),
        processing_class=TOKENIZER,
        optimizers=(optimizer, None),
    ).train()
    return optimizer.gradients


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("stored", [False, True])
def test_dpo(steps: int, stored: bool, tmp_path: Path) -> None:
    """The gradients of TRL's own loss, where all micro-batches have as many pairs; with stored references too."""
    options = {"precompute_ref_log_probs": stored}
    ours = dpo_gradients(trl_dpo.PullbackDPOTrainer, tmp_path, steps, preferences(), **options)
    theirs = dpo_gradients(trl.DPOTrainer, tmp_path, steps, preferences(), **options)
    assert len(ours) == len(theirs) == 2
    assert all(error(a, b) < LIMIT for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("name", "value"),
    [("loss_type", "ipo"), ("f_divergence_type", "forward_kl"), ("ld_alpha", 0.5), ("use_weighting", True)],
)
def test_dpo_of_other_kinds(name: str, value: Any, tmp_path: Path) -> None:
    """An option of TRL's that would make it another loss is refused, and not left out."""
    with pytest.raises(NotImplementedError, match=name):
        dpo_gradients(trl_dpo.PullbackDPOTrainer, tmp_path, 1, preferences(), **{name: value})


def mixture() -> Any:
    """A tiny mixture of experts, whose routers' loss TRL adds by default."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads))


@pytest.mark.parametrize("coefficient", [None, 0.0])
def test_a_mixture_of_experts(coefficient: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The routers' loss is refused, and not left out; without it the gradients are those of TRL."""
    monkeypatch.setattr(sys.modules[__name__], "toy_model", lambda seed=0: (torch.manual_seed(seed), mixture())[1])
    options: dict[str, Any] = {"router_aux_loss_coef": coefficient}
    ways: list[tuple[Any, ...]] = [
        (dpo_gradients, trl_dpo.PullbackDPOTrainer, trl.DPOTrainer, {"pairs": preferences()}),
        (grpo_gradients, trl_grpo.PullbackGRPOTrainer, trl.GRPOTrainer, LOSSES["dapo"]),
    ]
    for gradients, ours, theirs, others in ways:
        if coefficient is None:
            with pytest.raises(NotImplementedError, match="routers"):
                gradients(ours, tmp_path, 1, **options, **others)
            continue
        found, expected = (gradients(kind, tmp_path, 1, **options, **others) for kind in (ours, theirs))
        assert all(error(a, b) < LIMIT for a, b in zip(found, expected, strict=True))


class Naive(trl_dpo.PullbackDPOTrainer):
    """The trap: each micro-batch divides by its own pairs, and nothing divides again."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return DPO(self.beta).evaluate(self.token_batch(model, inputs)).loss


def test_dpo_of_a_last_micro_batch_that_is_short(tmp_path: Path) -> None:
    """Seven pairs in batches of two: ours is the plain formula over seven; TRL's weighs the last pair twice as much."""
    model, pairs = toy_model(), preferences(7)
    for pair in pairs:
        for side in pair.values():
            end = [] if side["input_ids"][-1] == 2 else [2]  # TRL ends each completion
            side["input_ids"] += end
            side["labels"] += end
    exact = gradient(model, dpo(model, toy_model(seed=1), pairs, 0.3))
    unended = preferences(7)
    assert error(dpo_gradients(trl_dpo.PullbackDPOTrainer, tmp_path, 4, unended)[0], exact) < LIMIT
    assert error(dpo_gradients(trl.DPOTrainer, tmp_path, 4, unended)[0], exact) > 0.01
    equal = dpo_gradients(trl_dpo.PullbackDPOTrainer, tmp_path, 4, preferences())[0]
    assert error(dpo_gradients(Naive, tmp_path, 4, preferences())[0], 4 * equal) < LIMIT


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Many different tokens, and few of them."""
    return [len(set(ids)) - 0.3 * len(ids) + ids[0] / 40 for ids in completion_ids]


def grpo_gradients(trainer: type, folder: Path, steps: int, **options: Any) -> list[torch.Tensor]:
    """What the optimizer is given in two steps on one generation, the second of which is off its policy."""
    toy_model().save_pretrained(folder / "reference")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "reference")
    with torch.no_grad():
        for p, other in zip(model.parameters(), toy_model(seed=1).parameters(), strict=True):
            p.add_(0.1 * other)
    optimizer = Recording(model.parameters(), lr=0.3)
    args = trl.GRPOConfig(
        **common(folder, steps),
        num_generations=2,
        num_iterations=2,
        max_completion_length=12,
        **options,
    )
    data = [{"prompt": words([5 + i, 9, 20 + i])} for i in range(8)]
    trainer(
        model,
        reward,
        args,
        train_dataset=datasets.Dataset.from_list(data),
        processing_class=TOKENIZER,
        optimizers=(optimizer, None),
    ).train()
    return optimizer.gradients


LOSSES: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo", "beta": 0.1},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.9, "epsilon_high": 0.02},
    "dapo": {"loss_type": "dapo", "beta": 0.1, "epsilon_high": 0.28},
    "bnpo": {"loss_type": "bnpo", "beta": 0.1, "use_bias_correction_kl": False},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 0.9, "epsilon_high": 0.02},
}


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("name", LOSSES)
def test_grpo(name: str, steps: int, tmp_path: Path) -> None:
    """Every loss type that we have, on and off policy, on the same generation."""
    ours = grpo_gradients(trl_grpo.PullbackGRPOTrainer, tmp_path, steps, **LOSSES[name])
    theirs = grpo_gradients(trl.GRPOTrainer, tmp_path, steps, **LOSSES[name])
    assert len(ours) == len(theirs) == 2
    assert theirs[1].norm() > 0
    assert error(theirs[1], theirs[0]) > 1e-3
    assert all(error(a, b) < LIMIT for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "cispo", "epsilon_high": 5.0, "beta": 0.1},
        {"loss_type": "luspo"},
        {"loss_type": "dapo", "importance_sampling_level": "sequence"},
        {**LOSSES["gspo"], "beta": 0.1},
        {"loss_type": "dapo", "off_policy_mask_threshold": 0.1},
        {"loss_type": "dapo", "use_adaptive_entropy": True},
    ],
)
def test_grpo_of_other_kinds(options: dict[str, Any], tmp_path: Path) -> None:
    """What a preset has not, a penalty, another level of ratios or a mask, is refused, and not left out."""
    with pytest.raises(NotImplementedError, match=r"not carried over|not that of this example"):
        grpo_gradients(trl_grpo.PullbackGRPOTrainer, tmp_path, 1, **options)


def test_grpo_of_images() -> None:
    """What the model reads beside the tokens is refused: without it the log-probs would be other ones."""
    with pytest.raises(NotImplementedError, match="images"):
        trl_grpo.PullbackGRPOTrainer.token_batch(Any, None, {"pixel_values": torch.zeros(1)})  # type: ignore[arg-type]


class OwnCount(trl_grpo.PullbackGRPOTrainer):
    """The trap: each micro-batch divides by its own tokens."""

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        return self.pullback_loss().evaluate(self.token_batch(model, inputs)).loss


@pytest.mark.parametrize("steps", [1, 4])
def test_grpo_by_own_counts(steps: int, tmp_path: Path) -> None:
    """The control: right at one step, and wrong by more than the whole gradient at four."""
    naive = grpo_gradients(OwnCount, tmp_path, steps, **LOSSES["dapo"])[0]
    theirs = grpo_gradients(trl.GRPOTrainer, tmp_path, steps, **LOSSES["dapo"])[0]
    assert error(naive, theirs) < LIMIT if steps == 1 else error(naive, theirs) > 1.0


ADAM = {"learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8}


def foreign_weights(
    folder: Path, steps: int, scale: float = 1.0, **options: Any
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The weights after two steps of TRL's trainer, on its own model and on a backend's; ``scale`` is of the cotangents."""
    models_ = [toy_model(), toy_model()]
    backend = TorchBackend(HFModel(models_[1]))
    backward = backend.backward
    backend.backward = lambda kept, data, *, cotangents: backward(  # type: ignore[method-assign, misc, assignment]
        kept, data, cotangents=[scale * c for c in cotangents]
    )
    own = torch.optim.AdamW(models_[0].parameters(), lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    foreign = trl_foreign_model.BackendOptimizer(backend, AdamParams(**ADAM))
    data = datasets.Dataset.from_list([{"prompt": words([5 + i, 9, 20 + i])} for i in range(8)])
    settings = {**common(folder, steps), "num_generations": 2, "num_iterations": 2, "max_completion_length": 12}
    args = trl.GRPOConfig(**{**settings, **options})
    kinds = (trl.GRPOTrainer, trl_foreign_model.ForeignModelGRPOTrainer)
    for kind, model, optimizer in zip(kinds, models_, (own, foreign), strict=True):
        trainer = kind(
            model, reward, args, train_dataset=data, processing_class=TOKENIZER, optimizers=(optimizer, None)
        )
        trainer.backend = backend
        trainer.train()
    first, second = ([p.detach() for p in model.parameters()] for model in models_)
    return first, second


@pytest.mark.parametrize(("steps", "schedule"), [(1, "constant"), (4, "constant"), (1, "linear")])
def test_a_backends_model_in_trls_trainer(steps: int, schedule: str, tmp_path: Path) -> None:
    """TRL's loss, pulled back through our graphs by its cotangents: two steps give the weights of its own model."""
    theirs, ours = foreign_weights(tmp_path, steps, lr_scheduler_type=schedule)
    start = list(toy_model().parameters())
    moved = max(float((a - b).norm() / b.norm()) for a, b in zip(theirs, start, strict=True))
    assert moved > 1e-2
    assert all(error(a, b) < 1e-4 for a, b in zip(ours, theirs, strict=True))


def test_a_backends_model_is_not_clipped_by_the_trainer(tmp_path: Path) -> None:
    """The trainer has no gradients to clip."""
    with pytest.raises(NotImplementedError, match="max_grad_norm"):
        foreign_weights(tmp_path, 1, max_grad_norm=1.0)


def test_a_cotangent_of_the_wrong_sign(tmp_path: Path) -> None:
    """The control: cotangents that are not TRL's give other weights."""
    theirs, ours = foreign_weights(tmp_path, 1, scale=-1.0)
    assert max(float(error(a, b)) for a, b in zip(ours, theirs, strict=True)) > 1e-2
