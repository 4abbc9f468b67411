"""One forward of a base for rows of several adapters: each row gets the low-rank products of its own adapter."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple, cast, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ....errors import UnsupportedError
from ..causal_lm import CausalLM
from ..models.hf import HFModel
from .low_rank import LowRank, low_rank

__all__ = ["RowAdapters"]


class _Layer(NamedTuple):
    """A layer of the base, and what each adapter adds to it: its matrices, those of lower rank filled up with zeros.

    Attributes:
        module: of the base.
        a: [N, r, in].
        b: [N, out, r], the scales included.
    """

    module: nn.Module
    a: Tensor
    b: Tensor


@final
class RowAdapters:
    """Adapters that are added to a base row by row. The matrices are copies, which are kept while they are in use.

    Args:
        base: without an adapter, if others than itself are to be decoded.
    """

    def __init__(self, base: HFModel) -> None:
        self._base, self._layers = base, list[_Layer]()
        self._places: WeakKeyDictionary[CausalLM, int] = WeakKeyDictionary()  # of each model's adapter in the matrices
        self._held = 0  # adapters that the matrices hold; of those that nobody has any more, the places are gone

    @contextmanager
    def of(self, models: Sequence[CausalLM]) -> Iterator[None]:
        """Let row i of the base's forwards be one of ``models[i]``.

        Raises:
            UnsupportedError: one of them is not the base with a low-rank adapter.
        """
        if all(model is self._base for model in models):
            yield
            return
        if any(model not in self._places for model in models):
            self._stack(list(dict.fromkeys(models)))
        pieces = _Pieces([self._places[model] for model in models], self._held, self._base.device)
        with ExitStack() as hooks:
            for layer in self._layers:
                hooks.callback(layer.module.register_forward_hook(partial(_add, pieces, layer)).remove)
            yield

    def clear(self) -> None:
        """Let go of all matrices."""
        self._layers.clear()
        self._places.clear()

    @torch.no_grad()
    def _stack(self, models: Sequence[CausalLM]) -> None:
        self.clear()
        adapters = [low_rank(cast(HFModel, model), self._base) for model in models]
        for path in dict.fromkeys(path for adapter in adapters for path in adapter):
            a, b = _stacked([adapter.get(path) for adapter in adapters])
            self._layers.append(_Layer(self._base.causal.get_submodule(path), a, b))
        self._places.update({model: i for i, model in enumerate(models)})
        self._held = len(models)


def _stacked(products: Sequence[LowRank | None]) -> tuple[Tensor, Tensor]:
    """Return the matrices of all adapters at one layer; zeros where one has none there."""
    present = {i: product for i, product in enumerate(products) if product is not None}
    like, rank = next(iter(present.values())), max(len(product.a) for product in present.values())
    a = like.a.new_zeros(len(products), rank, like.a.shape[1])
    b = like.b.new_zeros(len(products), like.b.shape[0], rank)
    for i, product in present.items():
        a[i, : len(product.a)] = product.a
        b[i, :, : len(product.a)] = product.scale * product.b
    return a, b


@final
class _Pieces:
    """Rows in pieces of equally many, each of one adapter, so that one batched product serves all.

    A piece has as many rows as an adapter has on average: one that has more has several pieces, and where one has fewer its
    first row fills up the last piece. So there are at most twice as many rows, however they are divided, and numbers of
    one adapter's rows never meet another's, even if they are not finite.

    Args:
        adapters: of each row, as a place in the matrices.
        total: adapters that the matrices hold.
        device: of the rows.
    """

    def __init__(self, adapters: Sequence[int], total: int, device: torch.device) -> None:
        groups = defaultdict[int, list[int]](list)
        for row, adapter in enumerate(adapters):
            groups[adapter].append(row)
        size = -(-len(adapters) // len(groups))
        pieces = [(one, groups[one][i : i + size]) for one in sorted(groups) for i in range(0, len(groups[one]), size)]
        filled = [rows + rows[:1] * (size - len(rows)) for _, rows in pieces]
        places = {row: size * i + j for i, (_, rows) in enumerate(pieces) for j, row in enumerate(rows)}
        self._rows = torch.tensor(filled, device=device)
        self._places = torch.tensor([places[row] for row in range(len(adapters))], device=device)
        chosen = [one for one, _ in pieces]
        self._adapters = None if chosen == list(range(total)) else torch.tensor(chosen, device=device)

    def product(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return ``x A^T B^T`` with the matrices of each row's adapter, [R, L, out].

        Args:
            x: [R, L, in].
            a: [N, r, in].
            b: [N, out, r].
        """
        if self._adapters is not None:
            a, b = a[self._adapters], b[self._adapters]
        pieces = x[self._rows].to(a.dtype)
        found = pieces.flatten(1, 2) @ a.mT @ b.mT
        return found.view(-1, x.shape[1], found.shape[-1])[self._places]

    def __len__(self) -> int:
        return len(self._places)


def _add(pieces: _Pieces, layer: _Layer, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """Add each row's product to the output of a layer."""
    (x,) = inputs
    if x.dim() != 3 or len(x) != len(pieces):
        raise UnsupportedError(f"a layer is given {list(x.shape)}, not the {len(pieces)} rows of the batch")
    return (output + pieces.product(x, layer.a, layer.b)).to(output.dtype)
