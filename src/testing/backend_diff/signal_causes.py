"""What the pattern of a divergence of cotangents, gradients or updates says of its cause."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...datums.types import Datum
from .causes import shifted
from .numbers import Pairs, counts_of, named_factor
from .results import LayerDiff

__all__ = ["cotangent_cause", "gradient_cause", "loss_cause", "update_cause"]


def loss_cause(a: float, b: float, data: Sequence[Datum], tolerance: float) -> str:
    """Return the likely cause of two values of the loss on the same log-probs."""
    if a and b and abs(b / a - 1) > tolerance:
        return f"the log-probs agree, and b's loss is {b / a:.6g} times a's: {named_factor(b / a, counts_of(data))}"
    return "the log-probs agree, so the loss is another one, or has other hyperparameters"


def cotangent_cause(pairs: Pairs, data: Sequence[Datum], tolerance: float) -> str:
    """Return the likely cause of cotangents that differ though log-probs and loss agree."""
    if not pairs.finite:
        return "a cotangent is NaN or infinite: a mask that multiplies, or a log-ratio that overflows"
    if pairs.is_multiple(tolerance):
        return f"b is {pairs.factor:.6g} times a: {named_factor(pairs.factor, counts_of(data))}"
    limit = tolerance * max(float(pairs.flat_a.abs().max()), float(pairs.flat_b.abs().max()))
    bad = pairs.beyond(limit)
    return (
        _by_sequence(pairs, tolerance)
        or _weighted(pairs, data, tolerance)
        or _silent(pairs, bad, data)
        or shifted(pairs, limit)
        or "the definitions differ: another loss, other hyperparameters, or an input that one side does not read"
    )


def gradient_cause(layers: Sequence[LayerDiff], factor: float, data: Sequence[Datum], tolerance: float) -> str:
    """Return the likely cause of gradients that differ though cotangents agree; ``layers`` are in forward order."""
    if all(layer.cosine > 1 - tolerance for layer in layers if layer.differs) and _one_ratio(layers, tolerance):
        return f"every gradient of b is {factor:.6g} times a's: {named_factor(factor, counts_of(data))}"
    differs = [layer.differs for layer in layers]
    silent = [layer.name for layer in layers if layer.differs and not (layer.a and layer.b)]
    last = max(i for i, bad in enumerate(differs) if bad)
    name = layers[last].name
    if sum(differs) == 1:
        one_sided = "has a gradient on one side only: frozen, detached or not shared"
        return f"{name} alone: {one_sided if silent else 'its own backward, or a scale'}"
    if all(differs[: last + 1]) and last + 1 < len(layers):
        what = "detached" if len(silent) == last + 1 else "wrong"
        where = f"between it and {layers[last + 1].name}"
        return f"everything up to {name} and nothing after it: the backward pass is {what} {where}"
    if silent:
        return f"no gradient on one side for {', '.join(silent[:5])}: frozen, detached, or not adapted there"
    return f"{sum(differs)} of {len(layers)} parameters, no pattern that is known"


def update_cause(pairs: Pairs, stage: str, data: Sequence[Datum], tolerance: float, adapters: bool) -> str:
    """Return the likely cause of changes of log-probs by one step that differ.

    Args:
        pairs: the changes.
        stage: ``gradient``: the step was along the gradient; ``update``: an optimizer step on gradients that agree.
        data: the datums.
        tolerance: relative.
        adapters: a side may train an adapter that nobody has compared.
    """
    if pairs.is_multiple(tolerance):
        words = named_factor(pairs.factor, counts_of(data)) if stage == "gradient" else "the learning rate"
        return f"the change by b's step is {pairs.factor:.6g} times that by a's: {words}"
    if stage == "update":
        return (
            "the gradients agree, so the optimizer does not: moments of earlier steps, eps, betas, weight decay, clipping, or "
            "the precision of the weights that are stepped on"
        )
    if adapters:
        return (
            "adapters that begin with other numbers, or of another rank, alpha or set of layers: train both from one "
            "checkpoint, or with one seed"
        )
    return "the backward pass through the model, or another set of trained weights"


def _one_ratio(layers: Sequence[LayerDiff], tolerance: float) -> bool:
    """Whether b's norm is a's times one number in all layers, and that number is not 1."""
    ratios = [layer.b / layer.a for layer in layers if layer.a]
    spread = max(ratios, default=1.0) - min(ratios, default=1.0)
    return all(layer.differs for layer in layers if layer.a) and spread <= 10 * tolerance * max(
        map(abs, ratios), default=0.0
    )


def _by_sequence(pairs: Pairs, tolerance: float) -> str:
    """Every sequence has a factor of its own."""
    each = [Pairs([a], [b]) for a, b in zip(pairs.a, pairs.b, strict=True) if bool((a != 0).any())]
    if len(each) < 2 or not all(one.relative <= tolerance or one.is_multiple(tolerance) for one in each):
        return ""
    trained = [int((one.flat_a != 0).sum()) for one in each]
    for divides, products in (
        ("b", [one.factor * n for one, n in zip(each, trained, strict=True)]),
        ("a", [n / one.factor for one, n in zip(each, trained, strict=True)]),
    ):
        if max(products) - min(products) <= 10 * tolerance * max(map(abs, products)):
            return (
                f"{divides} divides each sequence by its own length, and the other side does not: another aggregation"
            )
    factors = ", ".join(f"{one.factor:.4g}" for one in each[:6])
    return f"b is a times a factor of each sequence ({factors}): a weight of sequences, pairs or groups, or advantages"


def _weighted(pairs: Pairs, data: Sequence[Datum], tolerance: float) -> str:
    """One side has the weights once more."""
    if any("weights" not in datum.loss_fn_inputs for datum in data):
        return ""
    weights = [datum.loss_fn_inputs["weights"].to_torch() for datum in data]
    if all(bool(((w == 0) | (w == 1)).all()) for w in weights):
        return ""
    for name, one, other in (("b", pairs.a, pairs.b), ("a", pairs.b, pairs.a)):
        if Pairs([x * w for x, w in zip(one, weights, strict=True)], other).relative <= tolerance:
            return f"{name} has the weights in it once more than the other side"
    return ""


def _silent(pairs: Pairs, bad: Sequence[Tensor], data: Sequence[Datum]) -> str:
    """One side has no gradient at the tokens that differ."""
    for name, side in (("a", pairs.a), ("b", pairs.b)):
        if all(bool((x.reshape(len(x), -1)[mask] == 0).all()) for x, mask in zip(side, bad, strict=True)):
            return _where_silent(name, bad, data)
    return ""


def _where_silent(name: str, bad: Sequence[Tensor], data: Sequence[Datum]) -> str:
    trained = [_trained(datum, mask) for datum, mask in zip(data, bad, strict=True)]
    if not any(bool((mask & t).any()) for mask, t in zip(bad, trained, strict=True)):
        return f"only {'b' if name == 'a' else 'a'} trains tokens of weight 0: its mask is missing or moved"
    for at, words in ((0, "first"), (-1, "last")):
        ends = [t.nonzero()[[at], 0] for t in trained if bool(t.any())]
        masks = [mask for mask, t in zip(bad, trained, strict=True) if bool(t.any())]
        if all(bool(mask[end].all()) and int(mask.sum()) == 1 for mask, end in zip(masks, ends, strict=True)):
            return f"{name} has no gradient at the {words} trained token of every text: a slice or a shift by one"
    return (
        f"{name} has no gradient at these tokens: clipped, filtered or masked there (or a ratio lies close to a bound)"
    )


def _trained(datum: Datum, like: Tensor) -> Tensor:
    inputs: Mapping[str, object] = datum.loss_fn_inputs
    if "weights" not in inputs:
        return torch.ones_like(like)
    weights = datum.loss_fn_inputs["weights"].to_torch()
    return weights != 0 if weights.dim() == 1 else (weights != 0).any(-1)
