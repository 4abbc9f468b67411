"""The gradients of two backends, parameter by parameter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from .numbers import cosine_of, relative_difference
from .results import LayerDiff

__all__ = ["compare_layers", "completed", "forward_order", "gradient_vector", "same_parameters"]

_SMALL = 1e-2  # of the whole gradient: the error of a smaller one is measured against this


def same_parameters(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Return whether the gradients are of parameters of the same names and shapes."""
    shapes = [{name: tuple(x.shape) for name, x in side.items()} for side in (a, b)]
    return bool(a or b) and all(shapes[0].get(n, s) == s for n, s in shapes[1].items()) and bool(set(a) & set(b))


def gradient_vector(gradients: Mapping[str, Tensor]) -> Tensor:
    """Return all gradients end to end, fp64."""
    return torch.cat([x.detach().double().cpu().reshape(-1) for x in gradients.values()] or [torch.zeros(0).double()])


@contextmanager
def forward_order(model: object) -> Iterator[dict[str, None]]:
    """Give the names of a module's parameters in the order of its forward, which is known once a backward has run.

    A backward reaches them in the opposite order, and one that is used twice, as a tied embedding, at its first use too.
    """
    reached: list[str] = []
    order: dict[str, None] = {}
    parameters = model.named_parameters() if isinstance(model, nn.Module) else ()
    note = lambda name, _: reached.append(name)  # noqa: E731
    hooks = [p.register_post_accumulate_grad_hook(partial(note, name)) for name, p in parameters if p.requires_grad]
    try:
        yield order
    finally:
        for hook in hooks:
            hook.remove()
        order.update(dict.fromkeys(reversed(reached)))


def completed(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return both with the same parameters in the same order, that of the longer one; one that is missing is zero."""
    longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
    names = [*longer, *(name for name in shorter if name not in longer)]
    other = {**longer, **shorter}
    sides = [{name: side.get(name, torch.zeros_like(other[name])) for name in names} for side in (a, b)]
    return sides[0], sides[1]


def compare_layers(a: Mapping[str, Tensor], b: Mapping[str, Tensor], tolerance: float) -> tuple[LayerDiff, ...]:
    """Compare parameter by parameter what `completed` returns, in its order, which is that of the forward."""
    floor = _SMALL * max(float(gradient_vector(side).norm()) for side in (a, b))
    return tuple(_compare(name, a[name], b[name], tolerance, floor) for name in a)


def _compare(name: str, a: Tensor, b: Tensor, tolerance: float, floor: float) -> LayerDiff:
    x, y = (gradient_vector({name: g}) for g in (a, b))
    sizes, apart = (float(x.norm()), float(y.norm())), float((x - y).norm())
    differs = not apart <= tolerance * max(*sizes, floor)
    return LayerDiff(name, *sizes, relative_difference(x, y), cosine_of(x, y), differs)
