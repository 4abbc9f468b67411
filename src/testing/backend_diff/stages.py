"""The stages of a comparison, in order; none is compared after one that differs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, final

from torch import Tensor

from ...backends.types import AdamParams
from ...datums.types import Datum
from .causes import logprob_cause
from .layers import compare_layers, completed, gradient_vector, same_parameters
from .numbers import Pairs, flat
from .results import LayerDiff, StageDiff, TokenDiff, token_diffs
from .sides import Side, Signal
from .signal_causes import cotangent_cause, gradient_cause, loss_cause, update_cause
from .tolerances import Tolerance

__all__ = ["Comparison"]

_CHANGE: Final = 1e-2  # nats by which a step along the gradient should change a log-prob
_CURVED: Final = 2e-2  # by how much a step several times as long may change log-probs otherwise than as many times
_NOT_ALLOWED: Final = "what {} does cannot be undone; allow_step=True (--allow-step) lets it"


@final
@dataclass(eq=False)
class Comparison:
    """The stages in order; none is compared after one that differs."""

    a: Side
    b: Side
    data: Sequence[Datum]
    limits: Tolerance
    params: AdamParams
    tokenizer: Any
    stages: list[StageDiff] = field(default_factory=list)
    before: Pairs = field(default_factory=lambda: Pairs([], []))
    tokens_differing: int = 0
    tokens: tuple[TokenDiff, ...] = ()
    layers: tuple[LayerDiff, ...] = ()
    cause: str = ""

    @property
    def open(self) -> bool:
        """Whether no stage differs so far."""
        return all(stage.verdict != "differs" for stage in self.stages)

    @property
    def both(self) -> tuple[Side, Side]:
        return self.a, self.b

    def start(self) -> None:
        """Compare the log-probs; this changes nothing anywhere."""
        pairs = self.before = Pairs(self.a.logprobs(), self.b.logprobs())
        shapes = [(tuple(x.shape), tuple(y.shape)) for x, y in zip(pairs.a, pairs.b, strict=True)]
        other = [i for i, (x, y) in enumerate(shapes) if x != y]
        if other:
            note = f"datum {other[0]} has log-probs of shape {shapes[other[0]][0]} in a, and {shapes[other[0]][1]} in b"
            self.stages.append(StageDiff("logprobs", "differs", note=note))
            self.cause = "targets are cut, added or skipped on one side"
            return
        figures = {"largest": pairs.largest, "mean": pairs.mean}
        differs = self._judge("logprobs", figures, {"largest": self.limits.largest, "mean": self.limits.mean})
        if differs:
            limit = self.limits.largest if pairs.largest > self.limits.largest else self.limits.mean
            self._show(pairs, limit)
            self.cause = logprob_cause(pairs, limit, self.data, self._alone)

    def finish(self) -> None:
        """Compare everything else."""
        signals = self.a.signal(), self.b.signal()
        self._compare_loss(*signals)
        if self.open:
            self._compare_cotangents(*signals)
        if self.open:
            self._compare_gradients(*signals)
        if self.open:
            self._compare_updates()

    def _compare_loss(self, a: Signal, b: Signal) -> None:
        shared = [name for name in a.metrics if name in b.metrics and name.split(":")[0] == "loss"]
        if not shared:
            self._skip("loss", "the two report no value of the loss under one name")
            return
        name = shared[0]
        x, y = a.metrics[name], b.metrics[name]
        # an error of the log-probs that is within its tolerance moves the loss by the sum of its slopes
        slope = max((float(c.abs().sum()) for s in (a, b) if s.cotangents for c in [flat(s.cotangents)]), default=0.0)
        limit = self.limits.gradient * max(abs(x), abs(y)) + self.limits.mean * max(slope, 1.0)
        if self._judge("loss", {"a": x, "b": y, "difference": abs(x - y)}, {"difference": limit}, name):
            self.cause = loss_cause(x, y, self.data, 10 * self.limits.gradient)

    def _compare_cotangents(self, a: Signal, b: Signal) -> None:
        if a.cotangents is None or b.cotangents is None:
            self._compare_signal_metrics(a, b)
            return
        pairs = Pairs(a.cotangents, b.cotangents)
        figures = {"relative": pairs.relative, "cosine": pairs.cosine, "factor": pairs.factor}
        if self._judge("cotangent", figures, {"relative": self.limits.gradient}):
            largest = max(float(flat(side).abs().max()) for side in (pairs.a, pairs.b))
            self._show(pairs, self.limits.gradient * largest)
            self.cause = cotangent_cause(pairs, self.data, 10 * self.limits.gradient)

    def _compare_signal_metrics(self, a: Signal, b: Signal) -> None:
        """Where cotangents are computed elsewhere, compare what is reported of them."""
        where = " and ".join(s.name for s, x in zip(self.both, (a, b), strict=True) if x.cotangents is None)
        hidden = [s.name for s in self.both if not s.may_accumulate]
        why = _NOT_ALLOWED.format(" and ".join(hidden)) if hidden else f"{where} does not show its cotangents"
        name = "cotangent_abs:mean"
        if name not in a.metrics or name not in b.metrics:
            self._skip("cotangent", why)
            return
        x, y = a.metrics[name], b.metrics[name]
        factor = y / x if x else math.nan
        relative = abs(x - y) / max(abs(x), abs(y), 1e-300)
        if self._judge(
            "cotangent",
            {"relative": relative, "factor": factor},
            {"relative": self.limits.gradient},
            f"by {name}: {why}",
        ):
            self.cause = loss_cause(x, y, self.data, 10 * self.limits.gradient).replace("loss", "mean cotangent")

    def _compare_gradients(self, a: Signal, b: Signal) -> None:
        if not all(side.may_accumulate for side in self.both):
            self._skip("gradient", _NOT_ALLOWED.format(" and ".join(s.name for s in self.both if not s.may_accumulate)))
            return
        found = [side.gradients() for side in self.both]
        if found[0] is not None and found[1] is not None and same_parameters(found[0], found[1]):
            self._compare_layers(*completed(found[0], found[1]))
        elif all(side.may_step for side in self.both):
            self._compare_descents((a, b), found)
        else:
            self._skip("gradient", _NOT_ALLOWED.format(" and ".join(s.name for s in self.both if not s.may_step)))

    def _compare_layers(self, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
        self.layers = compare_layers(a, b, self.limits.gradient)
        pairs = Pairs([gradient_vector(a)], [gradient_vector(b)])
        figures = {"relative": max((one.relative for one in self.layers if one.differs), default=pairs.relative)}
        figures |= {"cosine": pairs.cosine, "factor": pairs.factor}
        note = f"{len(self.layers)} parameters"
        if any(one.differs for one in self.layers):
            first = next(one.name for one in self.layers if one.differs)
            self.stages.append(
                StageDiff(
                    "gradient", "differs", figures, {"relative": self.limits.gradient}, f"{note}; the first is {first}"
                )
            )
            self.cause = gradient_cause(self.layers, pairs.factor, self.data, 10 * self.limits.gradient)
            return
        self.stages.append(StageDiff("gradient", "same", figures, {"relative": self.limits.gradient}, note))

    def _compare_descents(self, signals: Sequence[Signal], gradients: Sequence[Mapping[str, Tensor] | None]) -> None:
        """Compare gradients by the change of log-probs by a step along each, in which a factor shows as a factor."""
        readable = next((gradient_vector(g) for g in gradients if g is not None), None)
        if readable is not None:
            norm = float(readable.norm())
        else:
            told = [side.change(self._of(side), _descent(0.0))[2] for side in self.both]
            norm = next((n for n in told if math.isfinite(n)), math.nan)
            for side in self.both:
                side.accumulate()
        if not norm > 0:
            self._skip("gradient", "neither side tells the norm of its gradient, or it is 0")
            return
        slopes = [float(flat(s.cotangents).abs().sum()) for s in signals if s.cotangents is not None]
        size = _CHANGE * max(slopes, default=float(len(flat(self.before.a)))) / norm**2
        self._compare_changes("gradient", _descent(size), "by the change of log-probs by a step along it")
        if self.open:
            for side in self.both:
                side.accumulate()

    def _compare_updates(self) -> None:
        hidden = [side.name for side in self.both if not side.may_step]
        if hidden:
            self._skip("update", _NOT_ALLOWED.format(" and ".join(hidden)))
            return
        note = f"by the change of log-probs by one step, learning rate {self.params.learning_rate:g}"
        self._compare_changes("update", self.params, note)

    def _compare_changes(self, stage: str, params: AdamParams, note: str) -> None:
        (after_a, a, _), (after_b, b, _) = (side.change(self._of(side), params) for side in self.both)
        pairs, self.before = Pairs(a, b), Pairs(after_a, after_b)
        size = max(float(pairs.flat_a.norm()), float(pairs.flat_b.norm()))
        noise = 2 * self.limits.mean * math.sqrt(len(pairs.flat_a))
        if size == 0:
            self._skip(stage, "a step changes no log-prob on either side: nothing is trained")
            return
        if size < 4 * noise:
            self._skip(
                stage,
                f"a step changes the log-probs by {size:.2g} nats (norm over the tokens), and rounding alone may by "
                f"{noise:.2g}; only {4 * noise:.2g} or more is compared: give a larger learning rate (--learning-rate)",
            )
            return
        limit = self.limits.update + noise / size
        figures = {"relative": pairs.relative, "cosine": pairs.cosine, "factor": pairs.factor}
        if self._judge(stage, figures, {"relative": limit}, note):
            self._show(pairs, limit * float(pairs.flat_a.abs().max()))
            adapters = not all(side.gradients() is not None for side in self.both)
            self.cause = update_cause(pairs, stage, self.data, max(3 * limit, _CURVED), adapters)

    def _of(self, side: Side) -> Sequence[Tensor]:
        return self.before.a if side is self.a else self.before.b

    def _alone(self, i: int) -> tuple[Tensor, Tensor]:
        return self.a.logprobs([self.data[i]])[0], self.b.logprobs([self.data[i]])[0]

    def _judge(self, stage: str, figures: Mapping[str, float], limits: Mapping[str, float], note: str = "") -> bool:
        """Enter a stage; return whether it differs."""
        differs = any(not figures[name] <= limit for name, limit in limits.items())
        self.stages.append(StageDiff(stage, "differs" if differs else "same", figures, limits, note))
        return differs

    def _skip(self, stage: str, why: str) -> None:
        self.stages.append(StageDiff(stage, "not compared", note=why))

    def _show(self, pairs: Pairs, limit: float) -> None:
        self.tokens_differing, self.tokens = token_diffs(pairs, limit, self.data, self.tokenizer)


def _descent(size: float) -> AdamParams:
    """Parameters with which an update is ``size`` times the gradient: no moments, and a large eps."""
    return AdamParams(learning_rate=1e6 * size, beta1=0.0, beta2=0.0, eps=1e6)
