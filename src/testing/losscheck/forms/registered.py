"""A `Loss`, evaluated on packed and padded batches and on lists of datums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, ClassVar, Final, final

import torch
from torch import Tensor

from ....datums.types import Datum, ModelInput
from ....losses.base import GradientKind, Loss
from ....losses.batch.adapt import batch_field
from ....losses.batch.token_batch import TokenBatch
from ....losses.evaluation.output import LossOutput
from ....losses.kind import measured_kind
from ...cases import Case
from ..failures import Failed
from .base import LossUnderTest
from .measured import leaves_of

__all__ = ["FIELDS", "RegisteredUnderTest", "padded_column"]

FIELDS: Final = ("advantages", "rollout_logprobs", "old_logprobs", "ref_logprobs")


@final
@dataclass(frozen=True)
class RegisteredUnderTest(LossUnderTest):
    """A loss of this library's kind.

    Attributes:
        loss: the loss.
    """

    loss: Loss = None  # type: ignore[assignment]  # fields of the base have defaults

    form: ClassVar[str] = "registered"
    layouts: ClassVar[tuple[str, ...]] = ("packed", "padded", "padded left", "list")

    @cached_property
    def kind(self) -> GradientKind | None:
        try:
            return _measured(self.loss)
        except Exception:
            return None

    @property
    def inputs(self) -> tuple[str, ...]:
        """All fields of a `TokenBatch` that it reads."""
        return tuple(batch_field(key) for key in (*self.loss.required_inputs, *self.loss.optional_inputs))

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(name for name in self.inputs if name in FIELDS)

    @property
    def required(self) -> tuple[str, ...]:
        needed = {batch_field(key) for key in self.loss.required_inputs}
        return tuple(name for name in self.fields if name in needed)

    @property
    def labelled(self) -> bool:
        return "label" in self.inputs

    @property
    def grouped(self) -> bool:
        return "group_id" in self.inputs

    def arguments(self, case: Case, leaves: Sequence[Tensor], layout: str) -> Any:
        with_old = case.with_old or "old_logprobs" in self.required
        fields = [n for n in ("weights", *self.fields) if n != "old_logprobs" or with_old]
        units = {name: ids for name, ids in self._units(case).items() if name in self.inputs}
        if layout == "list":
            return self._datums(case, fields, units), list(leaves)
        if layout == "packed":
            inputs = {n: _flat(self.spread(case), n, leaves[0].dtype) for n in fields}
            return TokenBatch.from_packed(torch.cat(list(leaves)), [leaf.numel() for leaf in leaves], **inputs, **units)
        left = layout == "padded left"
        logprobs = padded_column(list(leaves), torch.nan, left=left)
        columns = {n: _padded(self.spread(case), n, leaves[0].dtype, left) for n in fields}
        return TokenBatch.from_padded(logprobs, columns.pop("weights"), **columns, **units)

    def output(self, case: Case) -> LossOutput:
        """Return all that the loss has to say of a case."""
        return self.loss.evaluate(self.arguments(case, leaves_of(case), "packed"))

    def call(self, arguments: Any) -> tuple[Tensor, Mapping[str, Any]]:
        if not isinstance(arguments, TokenBatch):
            loss, metrics = self.loss(*arguments)
            return loss, metrics
        output = self.loss.evaluate(arguments)
        metrics = {name: metric.value for name, metric in output.metrics.items()}
        if "metrics_failed" in metrics:
            raise Failed("describe raises an error, so the metrics are missing", "see the log for the error")
        return output.loss, metrics

    def loss_of(self, arguments: Any) -> Tensor:
        return self.loss.evaluate(arguments).loss if isinstance(arguments, TokenBatch) else self.loss(*arguments)[0]

    def with_gradients(self, case: Case, leaves: Sequence[Tensor], layout: str, watched: dict[str, Tensor]) -> Any:
        for name in ("weights", *self.fields):
            watched[name] = _flat(self.spread(case), name, torch.float64).requires_grad_()
        units = {name: ids for name, ids in self._units(case).items() if name in self.inputs}
        lengths = [leaf.numel() for leaf in leaves]
        return TokenBatch.from_packed(torch.cat(list(leaves)), lengths, **watched, **units)

    def _units(self, case: Case) -> dict[str, Tensor]:
        return {**case.labels(), **case.units()}

    def _datums(self, case: Case, fields: Sequence[str], units: Mapping[str, Tensor]) -> list[Datum]:
        data = []
        for i, s in enumerate(self.spread(case).sequences):
            inputs: dict[str, Any] = {name: list(getattr(s, name)) for name in fields}
            if "rollout_logprobs" in inputs:
                inputs["logprobs"] = inputs.pop("rollout_logprobs")
            inputs |= {"target_tokens": [0] * len(s.logprobs), **{name: [ids[i].item()] for name, ids in units.items()}}
            data.append(Datum(ModelInput.from_ints([0] * len(s.logprobs)), inputs))
        return data


@lru_cache(maxsize=64)
def _measured(loss: Loss) -> GradientKind:
    return measured_kind(loss)


def padded_column(rows: Sequence[Tensor], fill: float, *, left: bool = False, spare: int = 1) -> Tensor:
    """Return rows as [B, T], padded with ``fill`` to the longest and ``spare`` columns more."""
    width = max(row.numel() for row in rows) + spare
    padding = [row.new_full((width - row.numel(),), fill) for row in rows]
    pairs = zip(padding, rows, strict=True)
    return torch.stack([torch.cat([pad, row] if left else [row, pad]) for pad, row in pairs])


def _flat(case: Case, name: str, dtype: torch.dtype) -> Tensor:
    return torch.tensor([x for s in case.sequences for x in getattr(s, name)], dtype=dtype)


def _padded(case: Case, name: str, dtype: torch.dtype, left: bool) -> Tensor:
    rows = [torch.tensor(list(getattr(s, name)), dtype=dtype) for s in case.sequences]
    return padded_column(rows, 0.0 if name == "weights" else torch.nan, left=left)
