"""Whether the head of a model is cut by rows: as it was asked, or by memory."""

from __future__ import annotations

from typing import Final, Literal

from torch import Tensor

from .....errors import ConfigError, UnsupportedError
from ...causal_lm import CausalLM
from .rows import HeadRows, why_whole

__all__ = ["VocabParallel", "choose_rows"]

VocabParallel = Literal["auto"] | bool
_SHARE: Final = 8  # a head that takes more than one part in so many of free memory is cut


def choose_rows(
    asked: VocabParallel, model: CausalLM, reference: CausalLM | None, free: float, shard_frozen: bool
) -> tuple[HeadRows | None, HeadRows | None]:
    """Return the rows of a model's head, and of its reference's; None: they stay whole.

    Args:
        asked: ``auto``: where the head, with its gradient, takes more than an eighth of the free memory, and can be cut.
        model, reference: whole.
        free: memory of the process that has least, bytes.
        shard_frozen: whether frozen weights are spread at all.

    Raises:
        ConfigError: none of these choices.
        UnsupportedError: it was asked for, and cannot be.
    """
    if asked not in (True, False, "auto"):
        raise ConfigError(f"vocab_parallel must be auto, True or False, got {asked!r}")
    if asked is False or (asked == "auto" and _bytes(model) * _SHARE <= free):
        return None, None
    for named, each in (("model", model), ("reference", reference)):
        reason = None if each is None else _kept(shard_frozen, each) or why_whole(each)
        if reason is None:
            continue
        if asked == "auto":
            return None, None
        raise UnsupportedError(f"vocab_parallel=True cannot cut the head of this {named}: {reason}; pass False")
    return HeadRows(model), None if reference is None else HeadRows(reference)


def _kept(shard_frozen: bool, model: CausalLM) -> str | None:
    if shard_frozen or model.head().trainable:
        return None
    return "it is frozen, and shard_frozen=False leaves frozen weights whole on every process"


def _bytes(model: CausalLM) -> float:
    head = model.head()

    def size(p: Tensor) -> int:
        return p.numel() * (p.element_size() + (max(4, p.element_size()) if p.requires_grad else 0))

    return float(size(head.weight) + (0 if head.bias is None else size(head.bias)))
