"""In which batch samples are drawn: that of the base, with all adapters that it can decode row by row, or one of their own."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Final, final

from ...backends.native.decoding.batch import ContinuousBatch
from ...backends.native.decoding.lane import LaneLimits
from ...backends.native.execution.forward import model_device
from ...backends.native.execution.memory import available_bytes
from ...backends.native.models.hf import HFModel

__all__ = ["Batches"]

_MEMORY: Final = 0.25  # of what is free, for the cache of one batch


@final
class Batches:
    """The batches of a service.

    Args:
        make: returns the base without an adapter, around the tensors that all adapted models share.
    """

    def __init__(self, make: Callable[[], HFModel]) -> None:
        self._make = make

    @cached_property
    def base(self) -> HFModel:
        """The base without an adapter."""
        return self._make()

    @cached_property
    def _shared(self) -> ContinuousBatch:
        return _batch(self.base)

    def of(self, model: HFModel) -> ContinuousBatch:
        """Return the batch that decodes a model's requests."""
        return self._shared if self._shared.accepts(model) else _batch(model)


def _batch(model: HFModel) -> ContinuousBatch:
    return ContinuousBatch(model, LaneLimits(memory=_MEMORY * available_bytes(model_device(model))))
