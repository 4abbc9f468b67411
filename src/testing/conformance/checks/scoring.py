"""Log-probs and loss values: of the same tokens the same numbers, whoever says them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from ....datums.types import Datum
from ....errors import PullbackError, UnsupportedError
from ....losses import get_loss
from ...under_test import BackendUnderTest, closing
from ..actions import scores
from ..check import Evidence, NotApplicable, check, refused, require

__all__ = ["SCORING"]

_VALUES: Final[tuple[tuple[str, dict[str, float]], ...]] = (
    ("cross_entropy", {}),
    ("importance_sampling", {}),
    ("ppo", {}),
    ("ppo", {"clip_low_threshold": 0.5, "clip_high_threshold": 3.0}),
)


@check("rows of a batch that see each other, padding that is scored, or results that come back in another order")
def scores_are_aligned(under_test: BackendUnderTest, evidence: Evidence) -> None:
    """Each target has one log-prob, at most 0; the order of datums does not matter; scoring changes nothing."""
    with under_test.backend() as backend:
        data = under_test.data()
        found = scores(backend, data)
        require([len(x) for x in found] == list(under_test.lengths), "forward: not one log-prob per target token")
        sound = all(bool((x <= 0).all() and x.isfinite().all()) for x in found)
        require(sound, "forward: these are no log-probs")
        again = scores(backend, data[::-1])[::-1]
        differences = [float((x - y).abs().max()) for x, y in zip(found, again, strict=True)]
        evidence.note(largest_difference_in_reverse_order=max(differences))
        for i, difference in enumerate(differences):
            require(difference <= under_test.nats, f"forward: datum {i} depends on the others")


@check("training that runs another code path than scoring: another dtype, dropout, or another attention kernel")
def forward_and_training_agree(under_test: BackendUnderTest, evidence: Evidence) -> None:
    """forward, forward_backward and the function of a custom call are given the same log-probs."""
    seen: list[Tensor] = []

    def function(_: Sequence[Any], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        seen.extend(x.detach().clone() for x in logprobs)
        return torch.stack([x.sum() for x in logprobs]).sum(), {}

    data = under_test.data()
    with under_test.backend() as backend:
        scored = scores(backend, data)
        trained = backend.forward_backward(data, "cross_entropy").result().loss_fn_outputs
        backend.forward_backward_custom(data, function).result()
    worst = {"forward_backward": 0.0, "custom": max(_apart(x, y) for x, y in zip(scored, seen, strict=True))}
    for x, output in zip(scored, trained, strict=True):
        kept = output["scored"].to_torch() != 0 if "scored" in output else torch.ones_like(x, dtype=torch.bool)
        worst["forward_backward"] = max(worst["forward_backward"], _apart(x[kept], output["logprobs"].to_torch()[kept]))
    evidence.note(**{f"{name} against forward, nats": value for name, value in worst.items()})
    for name, value in worst.items():
        require(value <= under_test.nats, f"{name}: log-probs are up to {value:.2e} nats from those of forward")


@check("a mean where the protocol has a sum, an ignored config key, or a loss that is not the one that was named")
def loss_values_match_the_definition(under_test: BackendUnderTest, evidence: Evidence) -> None:
    """The loss that forward and forward_backward report is the named loss of the log-probs that they return."""
    data, silent = under_test.data(), 0
    with under_test.backend() as backend:
        for name, config in _VALUES:
            for verb in (backend.forward, backend.forward_backward):
                try:
                    result = verb(data, name, config or None).result()
                except PullbackError as error:
                    refused(error, name)
                told = result.metrics.get("loss:sum")
                if told is None:
                    silent += 1
                    continue
                logprobs = [output["logprobs"].to_torch().double() for output in result.loss_fn_outputs]
                defined = float(get_loss(name, config)(data, logprobs)[0])
                size = sum(float(x.abs().sum()) for x in logprobs)
                evidence.note(**{f"{verb.__name__} {name}{' clipped otherwise' if config else ''}": told - defined})
                words = (
                    f"{verb.__name__} reports {name} {config or ''} = {told:.6g}; its own log-probs give {defined:.6g}"
                )
                require(
                    abs(told - defined) <= (1e-4 + under_test.nats) * size, words, _factor(under_test, told, defined)
                )
    if silent == 2 * len(_VALUES):
        raise UnsupportedError("no loss value is reported: the metrics have no loss:sum")


@check("other weights, another tokenizer's ids, a half-precision forward, or a wrong model")
def scores_match_the_reference(under_test: BackendUnderTest, evidence: Evidence) -> None:
    """Log-probs of the untrained model are those of a reference: another backend, or the model's own code."""
    if under_test.reference is None:
        raise NotApplicable("no reference was given")
    data = under_test.data()
    with under_test.backend() as backend, closing(under_test.reference()) as reference:
        pairs = zip(scores(backend, data), scores(reference, data), strict=True)
        errors = torch.cat([(x.double() - y.double()).abs() for x, y in pairs])
    evidence.note(largest_nats=float(errors.max()), mean_nats=float(errors.mean()))
    require(
        float(errors.max()) <= under_test.nats, f"log-probs are up to {float(errors.max()):.2e} nats from the reference"
    )


@check("targets that are flattened, or of which the first column alone is read")
def candidates_are_scored(under_test: BackendUnderTest, evidence: Evidence) -> None:
    """Targets [T, K] have log-probs [T, K], those of the same tokens as single targets."""
    with under_test.backend() as backend:
        columns = [under_test.data(), other_targets(under_test.data(), under_test.vocab_size)]
        try:
            found = scores(backend, with_candidates(*columns))
        except PullbackError as error:
            refused(error, "targets of shape [T, K]")
        singles = [scores(backend, column) for column in columns]
    shapes = [list(x.shape) for x in found]
    require(shapes == [[n, 2] for n in under_test.lengths], f"targets [T, 2] have log-probs of the shapes {shapes}")
    worst = max(_apart(x, torch.stack(one, -1)) for x, *one in zip(found, *singles, strict=True))
    evidence.note(largest_difference_from_single_targets=worst)
    require(worst <= under_test.nats, f"candidates are up to {worst:.2e} nats from the same tokens as single targets")


def other_targets(data: Sequence[Datum], vocab_size: int) -> list[Datum]:
    """Return the data with other targets and other weights."""
    changed = []
    for d in data:
        targets, weights = (d.loss_fn_inputs[key].to_torch() for key in ("target_tokens", "weights"))
        changed.append(d.with_inputs(target_tokens=(targets + 1) % vocab_size, weights=0.5 * weights))
    return changed


def with_candidates(first: Sequence[Datum], second: Sequence[Datum]) -> list[Datum]:
    """Return data with two targets a position."""
    keys = ("target_tokens", "weights")
    return [
        Datum(a.model_input, {k: torch.stack([d.loss_fn_inputs[k].to_torch() for d in (a, b)], -1) for k in keys})
        for a, b in zip(first, second, strict=True)
    ]


def _apart(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y.double()).abs().max()) if x.numel() else 0.0


def _factor(under_test: BackendUnderTest, told: float, defined: float) -> str:
    words = under_test.factor_in_words(told / defined) if defined else ""
    return f"the value is {told / defined:.4g} times the definition{words}" if words else ""


SCORING: Final = (
    scores_are_aligned,
    forward_and_training_agree,
    loss_values_match_the_definition,
    candidates_are_scored,
    scores_match_the_reference,
)
