"""Whether a model's cache may be decoded with, and whether rows of adapters may be among its own: tried, not assumed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ....errors import UnsupportedError
from ..models.facts.probes import probe_sequences
from ..models.facts.probing import drawn_adapters, in_float32
from ..models.hf import HFModel
from .cached import CachedDecoder
from .decoders import Decoder, PlainDecoder
from .low_rank import low_rank
from .requests import Text

__all__ = ["adapter_agrees", "cache_agrees"]

_logger = logging.getLogger(__name__)
_TOLERANCE: Final = 1e-3  # of logits, relative
_HALF_TOLERANCE: Final = 1e-2  # where the head itself rounds to half precision
_PROBED: Final = 64  # tokens of a window up to which sampling is tried beyond it
_agrees: WeakKeyDictionary[HFModel, bool] = WeakKeyDictionary()  # by model
_adapters: WeakKeyDictionary[HFModel, dict[frozenset[str], bool]] = WeakKeyDictionary()  # by base, then by layers


def cache_agrees(model: HFModel) -> bool:
    """Return whether decoding with a cache gives the logits of whole forwards; tried once a model, on a few tokens.

    The prompts differ in length, are copied, one enters late and some rows leave early, so that cache, mask and positions
    are used.
    """
    if model not in _agrees:
        difference = _tried(model, [model, model, model])
        _agrees[model] = _is_small(difference, model)
        if not _agrees[model]:
            _logger.warning(
                "%s is sampled without a cache, at quadratic cost: with one its logits are not those of its forward (%s)",
                type(model.model).__name__,
                difference,
            )
    return _agrees[model]


def adapter_agrees(base: HFModel, model: HFModel) -> bool:
    """Return whether rows of a model may be decoded by its base, with what its adapter adds to each of them.

    It may if the adapter is a low-rank product on linear layers, if all other weights are the base's own, and if the logits are
    then those of whole forwards of the model. The last is tried once for each set of layers, beside rows of the base, with
    weights that are drawn for it.
    """
    try:
        layers = frozenset(low_rank(model, base))
    except UnsupportedError as error:
        _logger.info("an adapter is decoded in a batch of its own: %s", error)
        return False
    known = _adapters.setdefault(base, {})
    if layers not in known:
        difference = _tried(base, [model, base, model]) if cache_agrees(base) else "without a cache"
        known[layers] = _is_small(difference, base)
        if not known[layers]:
            _logger.info("adapters are decoded in batches of their own: beside others they differ (%s)", difference)
    return known[layers]


def _tried(model: HFModel, models: Sequence[HFModel]) -> float | str:
    """Return how far the logits of a decoder of a model are from those of whole forwards of the models of its texts."""
    texts = [Text(one, prompt) for one, prompt in zip(models, _probe_prompts(model), strict=True)]
    try:
        with torch.no_grad(), ExitStack() as state:
            for one in {model, *models}:
                state.enter_context(in_float32(one))
            for adapted in {*models} - {
                model
            }:  # a fresh adapter would add nothing, and one that diverged speaks for no other
                state.enter_context(drawn_adapters(adapted))
            return _decoding_difference(CachedDecoder(model), PlainDecoder(), texts)
    except Exception as error:  # whatever a model raises that knows no such cache
        return f"{type(error).__name__}: {error}"


def _is_small(difference: float | str, model: HFModel) -> bool:
    limit = _HALF_TOLERANCE if model.head().weight.element_size() < 4 else _TOLERANCE
    return isinstance(difference, float) and difference <= limit


def _probe_prompts(model: HFModel) -> list[Tensor]:
    vocab = model.head().weight.shape[0]
    window = max((n for n in model.facts.thresholds if n <= _PROBED), default=None)
    return [request.tokens for request in probe_sequences(vocab, window)[:3]]


def _decoding_difference(cached: Decoder, plain: Decoder, texts: Sequence[Text]) -> float:
    """Return the largest relative difference of logits over a few steps; NaN if one is not finite."""
    first, second, late = texts
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


def _joined(decoders: tuple[Decoder, Decoder], texts: Sequence[Text]) -> tuple[Tensor, Tensor]:
    """Return both decoders' logits of two rows of each text."""
    first, second = (decoder.join(texts, [2] * len(texts)) for decoder in decoders)
    return first, second
