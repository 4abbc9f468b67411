"""A Tinker-style function: ``(data, logprobs_list) -> (loss, metrics)``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

from torch import Tensor

from ....datums.types import Datum, ModelInput, TensorData
from ...cases import Case
from ..failures import Failed
from .base import LossUnderTest
from .names import FIELD_OF, role_of
from .registered import FIELDS

__all__ = ["DatumsUnderTest"]


@final
@dataclass(frozen=True)
class DatumsUnderTest(LossUnderTest):
    """A function of datums. What it reads of them is noted when it is called.

    Attributes:
        function: what is called.
        read: fields that it was seen to read, by their names.
        used: fields that it got with all others, and that matter to it.
    """

    function: Callable[..., Any] = None  # type: ignore[assignment]  # fields of the base have defaults
    read: set[str] = field(default_factory=set, compare=False)
    used: set[str] = field(default_factory=set, compare=False)

    form: ClassVar[str] = "datums"

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(name for name in FIELDS if name in self.read | self.used)

    @property
    def required(self) -> tuple[str, ...]:
        return tuple(name for name in FIELDS if name in self.read)

    @property
    def labelled(self) -> bool:
        return "label" in self.read

    @property
    def grouped(self) -> bool:
        return "group_id" in self.read

    def arguments(self, case: Case, leaves: Sequence[Tensor], layout: str) -> Any:
        case = self.spread(case)
        return [self._datum(case, i) for i in range(len(case.sequences))], list(leaves)

    def call(self, arguments: Any) -> tuple[Tensor, Mapping[str, Any]]:
        returned = self.function(*arguments)
        if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], Mapping)):
            raise Failed(
                f"{self.name} returned {type(returned).__name__}",
                "forward_backward_custom wants the two things (loss, metrics), the metrics in a dict",
            )
        return self.reduced(returned)

    def _datum(self, case: Case, index: int) -> Datum:
        s = case.sequences[index]
        inputs: dict[str, Any] = {name: list(getattr(s, name)) for name in ("weights", *FIELDS)}
        inputs["logprobs"] = inputs.pop("rollout_logprobs")
        inputs |= {"target_tokens": [0] * len(s.logprobs), "label": [s.label], "reference_point": [s.reference_point]}
        inputs |= {name: [int(ids[index])] for name, ids in case.units().items()}
        datum = Datum(ModelInput.from_ints([0] * len(s.logprobs)), inputs)
        object.__setattr__(datum, "loss_fn_inputs", _Recording(datum.loss_fn_inputs, self.read))
        return datum


@final
class _Recording(dict[str, TensorData]):
    """Inputs that note what is read, and know the field's other names for them, e.g. ``mask`` for ``weights``."""

    def __init__(self, inputs: Mapping[str, TensorData], read: set[str]) -> None:
        super().__init__(inputs)
        self._read = read

    def __getitem__(self, name: str) -> TensorData:
        role = role_of(name)
        key = name
        if not super().__contains__(name):
            key = {"weights": "weights", "mask": "weights", "rollout": "logprobs"}.get(
                role or "", FIELD_OF.get(role or "", name)
            )
        value = super().__getitem__(key)
        self._read.add("rollout_logprobs" if key == "logprobs" else key)
        return value

    def __contains__(self, name: object) -> bool:
        try:
            return isinstance(name, str) and self[name] is not None
        except KeyError:
            return False

    def get(self, name: str, default: Any = None) -> Any:
        found = name in self  # by another name, too
        return self[name] if found else default
