"""Decoding with the cache of transformers: rows end at the same column, and may enter and leave at any step."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import pad

from ....errors import UnsupportedError, require_extra
from ....ops.logprobs import head_logits
from ..causal_lm import CausalLM
from ..execution.forward import model_device
from ..models.hf import HFModel
from .requests import Text
from .row_adapters import RowAdapters

__all__ = ["CachedDecoder"]

_LAYERS: Final = ("DynamicLayer", "DynamicSlidingWindowLayer", "DynamicIndexedLayer")
_PARTS: Final = {  # what a layer holds for each token, with the dimensions of rows and of columns
    "keys": (0, 2),
    "values": (0, 2),
    "indexer_keys": (0, 1),
    "indexer_position_ids": (1, 2),
}
_KEPT_TOKENS: Final = 8192  # of a model's texts whose caches are kept for rows that come later


@final
@dataclass(frozen=True, eq=False)
class _ReadText:
    """The cache of one text: what each layer holds, of one row, and the logits of the next token, [1, V]."""

    length: int
    layers: Sequence[Mapping[str, Tensor]]
    logits: Tensor


class _Row(NamedTuple):
    """A row of the cache: its tokens, and the model whose row it is."""

    length: int
    model: CausalLM


@final
class CachedDecoder:
    """transformers models: each text is read once, and its cache is copied for its rows, also for those that come later.

    The cache of all rows is as wide as the longest one; shorter rows begin with columns that the mask hides.

    Args:
        model: it runs all rows, also those of its adapters. Its weights, and theirs, must not change meanwhile.
    """

    def __init__(self, model: HFModel) -> None:
        self._model, self._device = model, model_device(model)
        self._adapters = RowAdapters(model)
        self._cache: Any = None
        self._rows: list[_Row] = []
        self._texts: WeakKeyDictionary[CausalLM, OrderedDict[bytes, _ReadText]] = WeakKeyDictionary()

    @property
    def bytes_per_token(self) -> int:
        return 0 if self._cache is None else sum(map(_token_bytes, _layers(self._cache)))

    def join(self, texts: Sequence[Text], copies: Sequence[int]) -> Tensor:
        read = self._read(texts)
        for text, count in zip(texts, copies, strict=True):
            self._rows += [_Row(len(text), text.model)] * count
        width = max(row.length for row in self._rows)
        for i, layer in enumerate(_layers(self._cache)):
            _append(layer, [(text.layers[i], count) for text, count in zip(read, copies, strict=True)], width)
        return torch.cat([text.logits.expand(count, -1) for text, count in zip(read, copies, strict=True)])

    def step(self, tokens: Sequence[int]) -> Tensor:
        self._rows = [row._replace(length=row.length + 1) for row in self._rows]
        return self._logits(torch.tensor(tokens, device=self._device)[:, None], self._rows, self._cache)

    def keep(self, rows: Sequence[int]) -> None:
        if not rows:
            self._adapters.clear()
        if self._cache is None or (rows and len(rows) == len(self._rows)):
            return
        self._rows = [self._rows[i] for i in rows]
        width = max((row.length for row in self._rows), default=0)
        index = torch.tensor(rows, dtype=torch.int64, device=self._device)
        for layer in _layers(self._cache):
            _select(layer, index, width)

    def _read(self, texts: Sequence[Text]) -> list[_ReadText]:
        """Return the caches of texts, after reading those that are not kept."""
        new = [text for text in texts if text.content not in self._texts.setdefault(text.model, OrderedDict())]
        for text, read in zip(new, self._run(new) if new else [], strict=True):
            self._texts[text.model][text.content] = read
        caches = []
        for text in texts:
            self._texts[text.model].move_to_end(text.content)
            caches.append(self._texts[text.model][text.content])
        for kept in self._texts.values():
            while kept and sum(text.length for text in kept.values()) > _KEPT_TOKENS:
                kept.popitem(last=False)
        return caches

    def _run(self, texts: Sequence[Text]) -> list[_ReadText]:
        """Read texts by one forward, each ending at the last column."""
        transformers = require_extra("transformers", "hf", "sampling")
        rows = [_Row(len(text), text.model) for text in texts]
        width = max(row.length for row in rows)
        tokens = torch.stack([pad(text.tokens, (width - len(text), 0)) for text in texts]).to(self._device)
        cache = transformers.DynamicCache(config=self._model.config)
        logits = self._logits(tokens, rows, cache)
        unknown = {type(layer).__name__ for layer in _layers(cache)} - set(_LAYERS)
        if unknown:
            raise UnsupportedError(f"rows cannot enter a cache with layers of the kind {', '.join(sorted(unknown))}")
        read = [
            _ReadText(row.length, [_row(x, i, row.length) for x in _layers(cache)], logits[i : i + 1])
            for i, row in enumerate(rows)
        ]
        if self._cache is None:
            self._cache = cache
            for layer in _layers(cache):
                _select(layer, torch.empty(0, dtype=torch.int64, device=self._device), 0)
        return read

    def _logits(self, tokens: Tensor, rows: Sequence[_Row], cache: Any) -> Tensor:
        """Return the logits after the last of ``tokens`` [R, L], of rows that are as long as they say by then."""
        width, ends = max(row.length for row in rows), torch.tensor([row.length for row in rows], device=self._device)
        places = torch.arange(width, device=self._device) - width + ends[:, None]  # negative before the row begins
        positions = places.clamp(min=0)[:, -tokens.shape[1] :]
        with self._adapters.of([row.model for row in rows]):
            hidden = self._model.cached_states(tokens, (places >= 0).long(), positions, cache)
        return head_logits(hidden[:, -1], self._model.head())


def _layers(cache: Any) -> list[Any]:
    """Return the layers that hold anything: those that share another's keys hold none."""
    return [layer for layer in cache.layers if getattr(layer, "is_initialized", True)]


def _parts(layer: Any) -> dict[str, tuple[int, int]]:
    """Return the names of what a layer holds, with the dimensions of rows and of columns."""
    return {name: dims for name, dims in _PARTS.items() if isinstance(getattr(layer, name, None), Tensor)}


def _token_bytes(layer: Any) -> int:
    total = 0
    for name, dims in _parts(layer).items():
        part: Tensor = getattr(layer, name)
        total += part.element_size() * math.prod(n for dim, n in enumerate(part.shape) if dim not in dims)
    return total


def _depth(layer: Any, width: int) -> int:
    """Columns that a layer keeps of so many: all, or those that its window reaches from the next token."""
    return min(width, layer.sliding_window - 1) if layer.is_sliding else width


def _last(values: Tensor, depth: int, dim: int) -> Tensor:
    """Return the last ``depth`` entries along a dimension, with zeros before them where there are fewer."""
    short = depth - values.shape[dim]
    if short > 0:
        return pad(values, (0, 0) * (values.dim() - 1 - dim) + (short, 0))
    return values.narrow(dim, -short, depth)


def _row(layer: Any, row: int, length: int) -> dict[str, Tensor]:
    """Return copies of what a layer holds of one row, without the columns before it begins."""
    depth, parts = _depth(layer, length), {}
    for name, (rows, columns) in _parts(layer).items():
        part = getattr(layer, name).narrow(rows, row, 1)
        parts[name] = part.narrow(columns, part.shape[columns] - depth, depth).clone()
    return parts


def _append(layer: Any, added: Sequence[tuple[Mapping[str, Tensor], int]], width: int) -> None:
    """Add copies of single rows after a layer's rows, all as wide as the widest."""
    depth = _depth(layer, width)
    for name, (rows, columns) in _parts(layer).items():
        parts = [_last(getattr(layer, name), depth, columns)]
        for row, count in added:
            part = _last(row[name], depth, columns)
            parts.append(part.expand([count if dim == rows else -1 for dim in range(part.dim())]))
        setattr(layer, name, torch.cat(parts, rows))
    _declare(layer, width)


def _select(layer: Any, rows: Tensor, width: int) -> None:
    """Keep these rows, and of their columns those of the longest one."""
    depth = _depth(layer, width)
    for name, (along, columns) in _parts(layer).items():
        setattr(layer, name, _last(getattr(layer, name), depth, columns).index_select(along, rows))
    _declare(layer, width)


def _declare(layer: Any, width: int) -> None:
    """Tell a layer with a window how many columns there have been."""
    if layer.is_sliding:
        layer.cumulative_length = width
