"""Whether a model's cache may be decoded with: it must give what the model's own forward gives."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..models.facts.probes import probe_sequences
from ..models.facts.probing import in_float32
from ..models.hf import HFModel
from .cached import CachedDecoder
from .decoders import Decoder, PlainDecoder

__all__ = ["cache_agrees"]

_logger = logging.getLogger(__name__)
_TOLERANCE: Final = 1e-3  # of logits, relative
_HALF_TOLERANCE: Final = 1e-2  # where the head itself rounds to half precision
_PROBED: Final = 64  # tokens of a window up to which sampling is tried beyond it
_agrees: WeakKeyDictionary[HFModel, bool] = WeakKeyDictionary()  # by model


def cache_agrees(model: HFModel) -> bool:
    """Return whether decoding with a cache gives the logits of whole forwards; tried once a model, on a few tokens.

    The prompts differ in length, are copied, one enters late and some rows leave early, so that cache, mask and positions
    are used.
    """
    if model not in _agrees:
        difference: float | str
        try:
            with torch.no_grad(), in_float32(model):
                difference = _decoding_difference(CachedDecoder(model), PlainDecoder(model), _probe_prompts(model))
        except Exception as error:  # whatever a model raises that knows no such cache
            difference = f"{type(error).__name__}: {error}"
        limit = _HALF_TOLERANCE if model.head().weight.element_size() < 4 else _TOLERANCE
        _agrees[model] = isinstance(difference, float) and difference <= limit
        if not _agrees[model]:
            _logger.warning(
                "%s is sampled without a cache, at quadratic cost: with one its logits are not those of its forward (%s)",
                type(model.model).__name__,
                difference,
            )
    return _agrees[model]


def _probe_prompts(model: HFModel) -> list[Tensor]:
    vocab = model.head().weight.shape[0]
    window = max((n for n in model.facts.thresholds if n <= _PROBED), default=None)
    return [request.tokens for request in probe_sequences(vocab, window)[:3]]


def _decoding_difference(cached: Decoder, plain: Decoder, prompts: Sequence[Tensor]) -> float:
    """Return the largest relative difference of logits over a few steps; NaN if one is not finite."""
    first, second, late = prompts
    logits = [_joined((cached, plain), [first, second])]
    for keep, entering in ([0, 1, 2, 3], []), ([0, 2, 3], [late]), ([0, 1, 2, 4], []), ([1, 2, 3], [first]):
        tokens = logits[-1][1][keep].argmax(-1).tolist()
        for decoder in (cached, plain):
            decoder.keep(keep)
        stepped = (cached.step(tokens), plain.step(tokens))
        joined = _joined((cached, plain), entering) if entering else (stepped[0][:0], stepped[1][:0])
        logits.append((torch.cat([stepped[0], joined[0]]), torch.cat([stepped[1], joined[1]])))
    differences = [float((a - b).norm() / b.norm()) for a, b in logits]
    return max(differences) if all(d == d for d in differences) else float("nan")


def _joined(decoders: tuple[Decoder, Decoder], texts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return both decoders' logits of two rows of each text."""
    first, second = (decoder.join(texts, [2] * len(texts)) for decoder in decoders)
    return first, second
