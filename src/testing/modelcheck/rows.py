"""The rows of `check_model`, and how a difference becomes a verdict with its likely cause."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, final

import torch
from torch import Tensor

from ...datums.types import Datum
from ...errors import PullbackError

__all__ = ["CAUSES", "Found", "ModelRow", "largest_difference", "row", "scored", "trained_share", "verdict_on"]

Verdict = Literal["right", "refused", "wrong", "not applicable"]
Found = tuple[Verdict, float | None, str]

# What usually lies behind a difference from the model's own forward, by layout and by what is compared.
CAUSES: Final = {
    "single": "it gives other numbers each time (dropout that evaluation mode leaves on), or its head is applied otherwise",
    "packed": "sequences of a row see each other, a window is lost, or positions do not begin anew",
    "forked": "answers that share a prompt see each other, or a window counts places in the row",
    "padded": "rows of a batch depend on each other, as with expert capacities or statistics of the batch, or padding is seen",
    "gradient": "a weight, often a tied head, is detached in the model's own forward, or a backward is not that of its forward",
    "adapter": "the adapter is applied in one of the two forwards only",
    "reference": "the model with its adapter off is not the one before training",
    "sampling": "the sampler scores its tokens otherwise: a cache, a temperature, or positions that are counted differently",
    "resume": "a weight or a moment of the optimizer is not in the checkpoint",
    "dtype": "logits or a softmax in half precision",
}


@final
@dataclass(frozen=True)
class ModelRow:
    """One line of the table.

    Attributes:
        name: what was checked.
        verdict: ``right``, ``refused`` (in words), ``wrong``, or ``not applicable``.
        figure: largest difference or share found; None where there is none.
        reason: why, in words; of a wrong row with the likely cause.
    """

    name: str
    verdict: Verdict
    figure: float | None = None
    reason: str = ""


def row(name: str, one: Callable[[], Found]) -> ModelRow:
    """Return the row of one check."""
    try:
        return ModelRow(name, *one())
    except PullbackError as error:
        return ModelRow(name, "refused", None, str(error))
    except Exception as error:  # whatever a model raises is a finding
        return ModelRow(name, "wrong", None, f"{type(error).__name__}: {error}")


def verdict_on(figure: float, most: float, cause: str) -> Found:
    """Return the verdict on a difference.

    Args:
        figure: the difference; NaN is wrong.
        most: the largest that is right.
        cause: a key of `CAUSES`.
    """
    if figure <= most:
        return "right", figure, ""
    return "wrong", figure, f"more than {most:g}. Likely cause: {CAUSES[cause]}"


def largest_difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference of any log-prob; infinity where one is NaN."""
    pairs = zip(found, expected, strict=True)
    differences = torch.stack([(a.detach().cpu().double() - b.detach().cpu().double()).abs().max() for a, b in pairs])
    return float(differences.nan_to_num(nan=float("inf")).max())


def scored(backend: Any, data: Sequence[Datum]) -> list[Tensor]:
    """Return the log-probs that a backend gives."""
    return [o["logprobs"].to_torch() for o in backend.forward(data).result().loss_fn_outputs]


def trained_share(model: Any) -> Found:
    """Return the share of the weights that is trained; wrong where no matrix within the layers has an adapter."""
    head = model.causal.get_output_embeddings()
    adapted, left = 0, set()
    for name, one in model.model.named_modules():
        if getattr(one, "lora_A", None):
            adapted += one is not head
        elif isinstance(one, torch.nn.Linear) and ".base_layer" not in name and "lora_" not in name:
            left.add(name.rsplit(".", 1)[-1])
    left |= {n.rsplit(".", 1)[-1] for n, p in model.model.named_parameters() if p.dim() == 3 and "lora" not in n}
    share = sum(p.numel() for p in model.parameters() if p.requires_grad) / sum(p.numel() for p in model.parameters())
    words = f"no adapter on: {', '.join(sorted(left))}" if left else "an adapter on every matrix"
    return ("right" if adapted else "wrong"), share, words if adapted else f"no layer is adapted; {words}"
