"""What scores as the reference: a frozen copy, or the base below a model's adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...errors import MissingReferenceError
from ..types import ForwardBackwardOutput
from .causal_lm import CausalLM
from .engine import Engine

__all__ = ["reference_forward"]


def reference_forward(engine: Engine, frozen: CausalLM | None) -> Callable[..., ForwardBackwardOutput]:
    """Return what scores with a frozen copy, or with the base below the model's adapters.

    Raises:
        MissingReferenceError: there is neither.
    """
    if frozen is not None:
        return lambda *call: engine.forward(frozen, *call)
    base_only = getattr(engine.module, "base_only", None)
    if base_only is None or not getattr(engine.module, "is_lora", False):
        raise MissingReferenceError(
            "this backend trains all weights and was given no reference; pass reference=<a frozen copy of the model> to "
            "TorchBackend, or train with LoRA, whose base is the reference"
        )

    def forward(*call: Any) -> ForwardBackwardOutput:
        with base_only():
            return engine.forward(engine.model, *call)

    return forward
