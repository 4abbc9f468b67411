"""The bare loop of examples/trainers: the gradient of a step, in any number of micro-batches; and the trap's factor."""

from __future__ import annotations

import math
import re
from pathlib import Path

import bare_loop
import pytest
import torch
from other_trainers.trainer_checks import TOLERANCE, Recording, error, gradient, mean_of_means, token_mean
from toy_rows import COMPLETIONS, micro_batches, rows, toy_model

from pullback.losses import CrossEntropy, TokenBatch
from pullback.ops import logprobs_of

pytest.importorskip("transformers")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [8, 3, 2, 1])
def test_the_gradient_of_a_step(dtype: torch.dtype, size: int) -> None:
    """That of the plain formula over the whole step's tokens, whatever the micro-batches."""
    model = toy_model().to(dtype)
    optimizer = Recording(model.parameters())
    loss = bare_loop.train_step(model, optimizer, micro_batches(rows(), size))
    exact = token_mean(model, rows())
    assert error(optimizer.gradients[0].double(), gradient(model, exact).double()) < TOLERANCE[dtype]
    assert loss == pytest.approx(exact.item(), rel=TOLERANCE[dtype])


def own_counts(size: int, divide: bool) -> torch.Tensor:
    """The loop that everybody writes first: each micro-batch divides by its own tokens."""
    model = toy_model()
    optimizer = Recording(model.parameters())
    batches = micro_batches(rows(), size)
    for batch in batches:
        labels = batch["labels"]
        loss = CrossEntropy("token_mean").evaluate(TokenBatch.from_labels(logprobs_of(model, **batch), labels)).loss
        torch.autograd.backward(loss / len(batches) if divide else loss)
    optimizer.step()
    return optimizer.gradients[0]


def test_the_figures_of_the_page() -> None:
    """Those that docs/trainers.md shows: what a token weighs, how long the gradient is, and how far it is turned."""
    page = (Path(__file__).parents[2] / "docs" / "trainers.md").read_text()
    pairs = [COMPLETIONS[i : i + 2] for i in range(0, len(COMPLETIONS), 2)]
    added = [sum(COMPLETIONS) / sum(pair) for pair in pairs]
    weights = [*added, *(weight / len(pairs) for weight in added), *(1.0 for _ in pairs)]
    assert _printed(page, "a token weighs") == [pytest.approx(weight, rel=0.05) for weight in weights]
    model = toy_model()
    exact = gradient(model, token_mean(model, rows()))
    naive = [own_counts(2, divide) for divide in (False, True)]
    lengths = [float(each.norm() / exact.norm()) for each in naive]
    assert _printed(page, "the gradient is") == [pytest.approx(length, abs=0.05) for length in lengths]
    degrees = [math.degrees(math.acos(torch.cosine_similarity(each, exact, dim=0))) for each in naive]
    assert degrees == [pytest.approx(51, abs=0.5)] * 2
    assert page.count("51 degrees") == 2


def _printed(page: str, beginning: str) -> list[float]:
    """The numbers of the lines of a page that begin so."""
    lines = [line for line in page.splitlines() if line.strip().startswith(beginning)]
    return [float(number) for line in lines for number in re.findall(r"(\d+\.?\d*) (?:x|times)", line)]


def test_a_mean_of_each_micro_batch_is_another_gradient() -> None:
    """The control: added up it is too large, and averaged a token of a short micro-batch weighs more than one of a long."""
    model = toy_model()
    exact = gradient(model, token_mean(model, rows()))
    for divide in (False, True):
        naive = own_counts(2, divide)
        assert error(naive, gradient(model, mean_of_means(model, rows(), 2, divide))) < 1e-5
        assert error(naive, exact) > 0.3
    assert own_counts(2, divide=False).norm() > 2 * exact.norm()
