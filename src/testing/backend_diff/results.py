"""What a comparison of two backends has found."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal, final

from ...datums.types import Datum
from .numbers import Pairs

__all__ = ["STAGES", "BackendDiff", "LayerDiff", "StageDiff", "TokenDiff", "token_diffs"]

STAGES: Final = ("logprobs", "loss", "cotangent", "gradient", "update")
_SHOWN: Final = 12  # tokens and layers in print


@final
@dataclass(frozen=True)
class StageDiff:
    """One stage.

    Attributes:
        stage: one of `STAGES`.
        verdict: what was found.
        figures: by name: ``largest`` and ``mean`` (nats), ``relative``, ``cosine``, ``factor`` (b over a).
        limits: what the figures of these names may be.
        note: how it was compared, or why not.
    """

    stage: str
    verdict: Literal["same", "differs", "not compared"]
    figures: Mapping[str, float] = field(default_factory=dict)
    limits: Mapping[str, float] = field(default_factory=dict)
    note: str = ""

    def __str__(self) -> str:
        return self.line()

    def line(self, tolerance_of: str = "") -> str:
        """Return the stage in one line; what is the same only within the tolerance of a dtype says so."""
        figures = [
            f"{name} {value:.3g}" + (f" (at most {self.limits[name]:.3g})" if name in self.limits else "")
            for name, value in self.figures.items()
        ]
        same = f"within {tolerance_of}'s tolerance" if tolerance_of else "same"
        verdict = {"same": same, "differs": "DIFFERS"}.get(self.verdict, self.verdict)
        width = max(13, len(same))
        return f"{self.stage:10} {verdict:{width}} {', '.join(figures + ([self.note] if self.note else []))}".rstrip()


@final
@dataclass(frozen=True)
class TokenDiff:
    """One token that differs.

    Attributes:
        datum, position: where it is; the position counts the tokens of the model input.
        token, target: ids of the input token there and of its target (several for soft targets).
        text: the target, decoded; None without a tokenizer.
        weight: of the target.
        a, b: the two numbers.
    """

    datum: int
    position: int
    token: int
    target: int | Sequence[int]
    text: str | None
    weight: float
    a: float
    b: float


@final
@dataclass(frozen=True)
class LayerDiff:
    """The gradients of one parameter.

    Attributes:
        name: of the parameter.
        a, b: their norms.
        relative: size of the difference over that of the larger one.
        cosine: of the angle between them.
        differs: beyond the tolerance.
    """

    name: str
    a: float
    b: float
    relative: float
    cosine: float
    differs: bool


@final
@dataclass(frozen=True)
class BackendDiff:
    """What `diff` has found; printed, it is a report.

    Attributes:
        a, b: the names of the two backends.
        loss: its name.
        dtypes: of the weights of each, as far as they are known.
        datums, tokens: how many were compared.
        stages: in order, as far as the first divergence.
        tokens_differing: how many tokens the divergence shows at.
        token_diffs: those of them that differ most, in the order of the data.
        layers: every parameter where the gradients were compared, in forward order.
        cause: of the divergence, where its pattern says one; empty without one.
        left: what was not put back; empty where both backends are as they were.
        tolerance_of: the dtype whose tolerance was taken; empty where another one was given.
    """

    a: str
    b: str
    loss: str
    dtypes: tuple[str, str]
    datums: int
    tokens: int
    stages: tuple[StageDiff, ...]
    tokens_differing: int = 0
    token_diffs: tuple[TokenDiff, ...] = ()
    layers: tuple[LayerDiff, ...] = ()
    cause: str = ""
    left: str = ""
    tolerance_of: str = ""

    @property
    def first(self) -> StageDiff | None:
        """The first stage that differs; None: there is none."""
        return next((stage for stage in self.stages if stage.verdict == "differs"), None)

    @property
    def diverges(self) -> bool:
        """Whether a stage differs."""
        return self.first is not None

    @property
    def first_layer(self) -> str | None:
        """The first parameter, in forward order, whose gradients differ."""
        return next((layer.name for layer in self.layers if layer.differs), None)

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain values; numbers that are not finite are strings."""
        found = asdict(self) | {"diverges": self.diverges, "first": self.first and self.first.stage}
        plain: dict[str, Any] = _plain(found)
        return plain

    def to_json(self) -> str:
        """Return `as_json` as text."""
        return json.dumps(self.as_json(), indent=1, allow_nan=False)

    def __str__(self) -> str:
        sides = f"{self.a} (a, {self.dtypes[0]}) and {self.b} (b, {self.dtypes[1]})"
        head = f"{sides}: {self.loss}, {self.datums} datums, {self.tokens} tokens"
        lines = [head, *(f"  {stage.line(self.tolerance_of)}" for stage in self.stages)]
        lines += [f"  {name:10} not reached" for name in STAGES[len(self.stages) :]]
        if self.token_diffs:
            lines += ["", *_token_table(self.token_diffs, self.tokens_differing)]
        if self.first and self.first.stage == "gradient" and self.layers:
            lines += ["", *_layer_table(self.layers)]
        verdict = "no divergence" if self.first is None else f"first divergence: {self.first.stage}"
        lines += ["", verdict, *([f"likely cause: {self.cause}"] if self.cause else [])]
        return "\n".join([*lines, self.left or "both backends are as they were"])


def token_diffs(
    pairs: Pairs, limit: float, data: Sequence[Datum], tokenizer: Any = None, most: int = _SHOWN
) -> tuple[int, tuple[TokenDiff, ...]]:
    """Return how many tokens differ by more than ``limit``, and those that do so most, in the order of the data."""
    found = [
        (float(apart[j]), i, int(j)) for i, apart in enumerate(pairs.by_token) for j in (apart > limit).nonzero()[:, 0]
    ]
    worst = sorted(sorted(found, reverse=True)[:most], key=lambda one: one[1:])
    return len(found), tuple(_token_diff(pairs, data[i], i, j, tokenizer) for _, i, j in worst)


def _token_diff(pairs: Pairs, datum: Datum, i: int, j: int, tokenizer: Any) -> TokenDiff:
    tokens, inputs = datum.model_input.to_ints(), datum.loss_fn_inputs
    target = inputs["target_tokens"].to_torch()[j].tolist() if "target_tokens" in inputs else tokens[j + 1]
    weights = inputs["weights"].to_torch() if "weights" in inputs else None
    a, b = pairs.a[i][j].double().reshape(-1), pairs.b[i][j].double().reshape(-1)
    at = int((a - b).abs().nan_to_num(nan=math.inf).argmax())
    ids = target if isinstance(target, list) else [target]
    text = None if tokenizer is None else str(tokenizer.decode(ids))
    weight = 1.0 if weights is None else float(weights[j].reshape(-1)[min(at, weights[j].numel() - 1)])
    return TokenDiff(i, j, tokens[j], target, text, weight, float(a[at]), float(b[at]))


def _token_table(tokens: Sequence[TokenDiff], count: int) -> list[str]:
    rows = [["datum", "position", "token", "target", "weight", "a", "b"]]
    for one in tokens:
        target = f"{one.target}" + ("" if one.text is None else f" {one.text!r}")
        row = [f"{one.datum}", f"{one.position}", f"{one.token}", target, f"{one.weight:g}"]
        rows.append([*row, f"{one.a:.6g}", f"{one.b:.6g}"])
    more = [f"    ({count - len(tokens)} more tokens differ)"] if count > len(tokens) else []
    return [*_aligned(rows), *more]


def _layer_table(layers: Sequence[LayerDiff]) -> list[str]:
    differing = [layer for layer in layers if layer.differs]
    rows = [["parameter, in forward order", "norm a", "norm b", "relative", "cosine"]]
    for layer in differing[:_SHOWN]:
        numbers = (layer.a, layer.b, layer.relative, layer.cosine)
        rows.append([layer.name, *(f"{x:.4g}" for x in numbers)])
    shown = min(_SHOWN, len(differing))
    more = f"    ({len(differing) - shown} more differ, {len(layers) - len(differing)} of {len(layers)} agree)"
    return [*_aligned(rows), more]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["    " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
