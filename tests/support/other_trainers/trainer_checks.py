"""The gradients that a step must have, by plain formulas of whole sequences, and an optimizer that keeps what it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid
from toy_rows import Row

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}  # relative to the norm of a gradient


class Recording(torch.optim.SGD):
    """Keeps the gradients of every step, flat; moves nothing, unless it is given a learning rate.

    Attributes:
        gradients: one tensor for each step.
    """

    def __init__(self, parameters: Iterable[Any], lr: float = 0.0) -> None:
        super().__init__(parameters, lr=lr)
        self.gradients: list[Tensor] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # nobody wants its loss
        if closure is not None:  # Lightning runs the model in it
            with torch.enable_grad():
                closure()
        parameters = [p for group in self.param_groups for p in group["params"]]
        assert all(p.grad is not None for p in parameters)
        self.gradients.append(torch.cat([p.grad.detach().flatten().clone() for p in parameters]))
        super().step()


def gradient(model: Any, value: Tensor) -> Tensor:
    """Return the gradient of a value with respect to every parameter, flat."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))])


def error(found: Tensor, exact: Tensor) -> float:
    """Return how far a gradient is from another one, relative to its norm."""
    return float((found - exact).norm() / exact.norm())


def negative_log_likelihoods(model: Any, rows: Sequence[Row]) -> list[Tensor]:
    """Return the sum over the trained tokens of each row, which is run alone and without padding."""
    sums = []
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1]
        sums.append(cross_entropy(logits, torch.tensor(row["labels"][1:]), ignore_index=-100, reduction="sum"))
    return sums


def trained(rows: Sequence[Row]) -> int:
    """Return how many tokens of the rows are trained."""
    return sum(label != -100 for row in rows for label in row["labels"][1:])


def token_mean(model: Any, rows: Sequence[Row]) -> Tensor:
    """Return the cross-entropy of a whole step, over its tokens."""
    return torch.stack(negative_log_likelihoods(model, rows)).sum() / trained(rows)


def mean_of_means(model: Any, rows: Sequence[Row], size: int, divide: bool) -> Tensor:
    """Return what becomes of it if every micro-batch divides by its own tokens; added up, or averaged."""
    parts = [rows[i : i + size] for i in range(0, len(rows), size)]
    total = torch.stack([token_mean(model, part) for part in parts]).sum()
    return total / len(parts) if divide else total


def dpo(model: Any, reference: Any, pairs: Sequence[Mapping[str, Row]], beta: float) -> Tensor:
    """Return the DPO loss of a whole step, over its pairs: -log sigmoid(beta (h_chosen - h_rejected))."""

    def log_ratios(side: str) -> Tensor:
        rows = [pair[side] for pair in pairs]
        with torch.no_grad():
            anchor = torch.stack(negative_log_likelihoods(reference, rows))
        return anchor - torch.stack(negative_log_likelihoods(model, rows))

    return -logsigmoid(beta * (log_ratios("chosen") - log_ratios("rejected"))).mean()


def equal_rows(rows: Sequence[Row], tokens: int) -> list[Row]:
    """Return rows with as many trained tokens each: there, the trap is a factor alone."""
    return [
        {name: column[: 3 + tokens] for name, column in row.items()} for row in rows if len(row["labels"]) >= 3 + tokens
    ]


Step = Callable[[Sequence[Row], int], Tensor]  # rows and the size of a micro-batch -> the gradient of one step
