"""A transformers-style function: ``(outputs or logits, labels, num_items_in_batch) -> loss``, which shifts by itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar, Final, final

import torch
from torch import Tensor

from ....losses.functional import log1mexp
from ...cases import Case
from .base import LossUnderTest
from .names import role_of
from .registered import padded_column

__all__ = ["LogitsUnderTest", "takes_logits"]

_IGNORED: Final = -100
_CERTAIN: Final = -1e-12  # a log-prob of 0 leaves no log-prob for the other token


@final
@dataclass(frozen=True)
class LogitsUnderTest(LossUnderTest):
    """A function of logits over two tokens, made so that the label's log-prob is that of the case.

    Attributes:
        function: what is called.
    """

    function: Callable[..., Any] = None  # type: ignore[assignment]  # fields of the base have defaults

    form: ClassVar[str] = "transformers"
    layouts: ClassVar[tuple[str, ...]] = ("right", "wide")
    poisonable: ClassVar[bool] = False

    @property
    def fields(self) -> tuple[str, ...]:
        return ()

    @property
    def weighs(self) -> bool:
        return False

    @property
    def counts(self) -> tuple[str, ...]:
        return tuple(name for name in inspect.signature(self.function).parameters if role_of(name) == "count")

    def arguments(self, case: Case, leaves: Sequence[Tensor], layout: str) -> Any:
        spare = 3 if layout == "wide" else 0
        masks = [torch.tensor([0 if w else _IGNORED for w in s.weights], dtype=torch.float64) for s in case.sequences]
        labels = padded_column(masks, _IGNORED, spare=spare).to(torch.int64)
        target = padded_column(list(leaves), -1.0, spare=spare)
        logits = torch.stack([target, log1mexp(target.clamp(max=_CERTAIN))], -1)
        # labels belong to input tokens: the logits at a position are those of the token after it
        last = logits.new_zeros(logits.shape[0], 1, 2)
        before = labels.new_full((labels.shape[0], 1), _IGNORED)
        count = torch.tensor(sum(len(s.trained()) for s in case.sequences))
        return {
            "logits": torch.cat([logits, last], 1),
            "labels": torch.cat([before, labels], 1),
            **dict.fromkeys(self.counts, count),
        }

    def call(self, arguments: Any) -> tuple[Tensor, Mapping[str, Any]]:
        called: dict[str, Any] = {}
        for name in inspect.signature(self.function).parameters:
            if name == "outputs":
                called[name] = _Outputs(logits=arguments["logits"])
            elif name == "logits":
                called[name] = arguments["logits"]
            elif name == "vocab_size":
                called[name] = 2
            elif role_of(name) == "labels":
                called[name] = arguments["labels"]
            elif name in self.counts:
                called[name] = arguments[name]
        return self.reduced(self.function(**called))


class _Outputs(SimpleNamespace):
    """What a model returned: its logits, by attribute or by name."""

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


def takes_logits(function: Callable[..., Any]) -> bool:
    """Return whether a function takes logits and labels."""
    names = set(inspect.signature(function).parameters)
    return "labels" in names and bool({"outputs", "logits"} & names)
