"""The Trainer of transformers with our losses: gradients of plain formulas, at 1 and 4 accumulation steps."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from other_trainers.trainer_checks import TOLERANCE, Recording, dpo, equal_rows, error, gradient, token_mean
from tiers import sampled
from toy_rows import collate, preferences, rows, toy_model

from pullback.errors import ConfigError
from pullback.losses import CrossEntropy, TokenBatch
from pullback.ops import logprobs_from_logits

transformers = pytest.importorskip("transformers")
import transformers_dpo  # noqa: E402
import transformers_trainer  # noqa: E402

LIMIT = TOLERANCE[torch.float32]


def arguments(folder: Path, steps: int, rows_a_step: int = 8) -> Any:
    return transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=rows_a_step // steps,
        gradient_accumulation_steps=steps,
        max_steps=1,
        max_grad_norm=0.0,  # no clipping
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
    )


def trained_by(trainer: type, model: Any, given: Any, data: Any, **options: Any) -> Any:
    """One step of a trainer; returns the gradient that its optimizer was given."""
    optimizer = Recording(model.parameters())
    trainer(model, given, train_dataset=data, optimizers=(optimizer, None), **options).train()
    assert len(optimizer.gradients) == 1
    return optimizer.gradients[0]


WAYS = {
    "compute_loss_func": (transformers.Trainer, {"compute_loss_func": transformers_trainer.compute_loss}),
    "chunked": (transformers_trainer.ChunkedTrainer, {}),
    "its own": (transformers.Trainer, {}),
}


@pytest.mark.parametrize("steps", sampled([1, 4], [4]))
@pytest.mark.parametrize("way", WAYS)
def test_cross_entropy(way: str, steps: int, tmp_path: Path) -> None:
    """Our loss in both forms, and the Trainer's own loss, have the gradient of the plain formula."""
    trainer, options = WAYS[way]
    model = toy_model()
    found = trained_by(trainer, model, arguments(tmp_path, steps), rows(), data_collator=collate, **options)
    assert error(found, gradient(model, token_mean(model, rows()))) < LIMIT


def naive(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    """The trap: the count is there, and is not used."""
    batch = TokenBatch.from_labels(logprobs_from_logits(outputs.logits, labels), labels)
    return CrossEntropy("token_mean").evaluate(batch).loss


@pytest.mark.parametrize(("steps", "factor"), [(1, 1.0), (4, 4.0)])
def test_without_the_count_the_gradient_is_too_large(steps: int, factor: float, tmp_path: Path) -> None:
    """The control, with as many tokens in every row: exactly as many times too large as there are micro-batches."""
    model, data = toy_model(), equal_rows(rows(), 6) + equal_rows(rows((9, 9, 9)), 6)
    options = {"data_collator": collate, "compute_loss_func": naive}
    found = trained_by(transformers.Trainer, model, arguments(tmp_path, steps), data, **options)
    assert error(found, factor * gradient(model, token_mean(model, data))) < LIMIT


@pytest.mark.parametrize("steps", sampled([1, 4], [4]))
def test_dpo(steps: int, tmp_path: Path) -> None:
    """The subclass has the gradient of the plain formula over the pairs of the whole step."""
    model, reference = toy_model(), toy_model(seed=1)
    options = {"reference": reference, "beta": 0.3}
    found = trained_by(transformers_dpo.DPOTrainer, model, arguments(tmp_path, steps), preferences(), **options)
    assert error(found, gradient(model, dpo(model, reference, preferences(), 0.3))) < LIMIT


def test_evaluation_is_the_mean_over_what_is_evaluated(tmp_path: Path) -> None:
    """Without a step there is one batch, and its own count."""
    model = toy_model()
    given = arguments(tmp_path, 1)
    given.per_device_eval_batch_size = 8
    for trainer, options in WAYS.values():
        found = trainer(model, given, eval_dataset=rows(), data_collator=collate, **options).evaluate()["eval_loss"]
        assert found == pytest.approx(token_mean(model, rows()).item(), rel=1e-5)
    pairs = transformers_dpo.DPOTrainer(model, given, eval_dataset=preferences(), reference=toy_model(seed=1))
    expected = dpo(model, toy_model(seed=1), preferences(), 0.1).item()
    assert pairs.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_trainer_that_does_not_count_is_refused() -> None:
    """The Trainer passes None where the batches have no labels."""
    model, batch = toy_model(), collate(rows())
    with pytest.raises(ConfigError, match="counts if the batches have labels"):
        transformers_trainer.compute_loss(model(batch["input_ids"]), batch["labels"], None)


@pytest.mark.parametrize(("over_all_ranks", "factor"), [(True, 2.0), (False, 1.0)])
def test_the_mean_over_ranks_is_undone_where_the_count_is_of_all_ranks(over_all_ranks: bool, factor: float) -> None:
    """Two ranks average their gradients: a count of both needs twice the loss, and a rank's own count needs it once."""
    stub: Any = SimpleNamespace(
        accelerator=SimpleNamespace(num_processes=2), args=SimpleNamespace(average_tokens_across_devices=over_all_ranks)
    )
    batch, model = collate(rows()), toy_model().eval()
    loss = transformers_trainer.ChunkedTrainer.compute_loss(stub, model, dict(batch), num_items_in_batch=117)
    expected = token_mean(model, rows())
    assert loss.item() == pytest.approx(factor * expected.item(), rel=1e-5)
