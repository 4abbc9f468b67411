"""Whether a model's own logits are its head's: also large ones, at which a bound shows that small ones never meet."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from .head import Head
from .logprobs import head_logits

__all__ = ["distance_to_own", "large_at_the_last"]

_LARGEST: Final = 1024.0  # far beyond the bound of any soft cap, and float16 still has it


@contextmanager
def large_at_the_last(head: nn.Module, answered: list[Tensor]) -> Iterator[None]:
    """Let a head answer numbers from -1024 to 1024 at the last of several positions, and the truth at the others.

    Args:
        head: the layer that computes a model's logits.
        answered: gets what it answers, [B, L, V] each; stays empty if the model does not call it. (It is an argument since
            a compiler cannot go on after a block that gives a list.)
    """

    def replace(module: nn.Module, given: Any, outputs: Any) -> Any:
        if type(outputs) is not Tensor or outputs.dim() != 3 or outputs.shape[1] < 2:
            return outputs
        line = torch.linspace(-_LARGEST, _LARGEST, outputs.shape[-1], dtype=outputs.dtype, device=outputs.device)
        changed = torch.cat([outputs[:, :-1], line.expand(len(outputs), 1, -1)], dim=1)
        answered.append(changed.detach().clone())  # the model may go on in place
        return changed

    hook = head.register_forward_hook(replace)
    try:
        yield
    finally:
        hook.remove()


def distance_to_own(hidden: Tensor, head: Head, answered: list[Tensor], theirs: Tensor) -> float:
    """Return the larger relative difference of ours and a model's logits: at the last position, and at the others.

    Args:
        hidden: [B, L, H], what the head was given.
        head: as we understand it.
        answered: of `large_at_the_last`, in which the model was called.
        theirs: [B, L, V], the model's logits.

    Raises:
        UnsupportedError: the model's logits are of another vocabulary.
    """
    if theirs.shape[-1] != len(head.weight):
        raise UnsupportedError(
            f"the model returns {theirs.shape[-1]} logits of each token, and its head has {len(head.weight)} rows, which would "
            "all take part in the log-probs; cut the head to the vocabulary (resize_token_embeddings)"
        )
    if not answered:
        return _relative(head_logits(hidden, head), theirs)
    # The other positions tell the scale. Some models scale what their head is given, and not its answers.
    scaled = [answered[0][:, -1].double() * scale for scale in {head.scale, 1.0}]
    last = min(_relative(_bounded(logits, head.softcap), theirs[:, -1]) for logits in scaled)
    others = _relative(head_logits(hidden[:, :-1], head), theirs[:, :-1])
    return max(last, others) if math.isfinite(last + others) else math.inf


def _bounded(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _relative(ours: Tensor, theirs: Tensor) -> float:
    wide = theirs.double()
    return float((ours.double() - wide).norm() / wide.norm().clamp(min=1e-30))
