"""What a backend trains: it is chosen when the backend is made, and checked before every gradient and step."""

from __future__ import annotations

from collections.abc import Collection
from typing import final

from torch import nn

from ...errors import BackendError
from .execution.forward import trainable
from .models.adapters import merged_layers

__all__ = ["TrainedWeights", "require_not_merged"]


@final
class TrainedWeights:
    """The weights that steps are made on, as they were when the backend was made.

    Args:
        module: the model; its parameters that ask for a gradient are trained.

    Attributes:
        parameters: of the model that ask for a gradient, by name.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.parameters = trainable(module)
        self._dtypes = {name: p.dtype for name, p in self.parameters.items()}

    def require_same(self) -> None:
        """Check that steps are still made on all that the model has to train, and that the adapter is what it computes with.

        Raises:
            BackendError: a weight was unfrozen, or put in the place of another, or has another dtype since the backend was
                made; an adapter is merged.
        """
        self.require_all({id(p) for p in self.parameters.values()})

    def require_all(self, known: Collection[int]) -> None:
        """Do what `require_same` does.

        Args:
            known: ids of the trained parameters, in every form that they have.
        """
        others = [name for name, p in trainable(self._module).items() if id(p) not in known]
        if others:
            raise BackendError(
                f"{len(others)} weights of the model ask for a gradient, and this backend does not train them ({others[0]}"
                f"{', ...' if others[1:] else ''}): they were unfrozen or replaced, or another adapter was switched on, after "
                "it was made; freeze them (requires_grad_(False)) or bring the old ones back, or make another backend on this "
                "model"
            )
        self._require_dtypes()
        require_not_merged(self._module)

    def _require_dtypes(self) -> None:
        changed = [(name, p.dtype) for name, p in self.parameters.items() if p.dtype != self._dtypes[name]]
        if changed:
            name, dtype = changed[0]
            raise BackendError(
                f"{len(changed)} of the weights that this backend trains have another dtype since it was made ({name} was "
                f"{self._dtypes[name]}, and is {dtype}): it would step on them without the fp32 masters that half precision "
                "needs, or with the wrong ones; convert the model first, then make the backend"
            )


def require_not_merged(module: nn.Module) -> None:
    """Check that a model computes with its adapter's own weights.

    Raises:
        BackendError: peft has added the adapter to the weights below it.
    """
    merged = list(merged_layers(module))
    if merged:
        raise BackendError(
            f"the adapter is merged into {len(merged)} layers ({merged[0]}{', ...' if merged[1:] else ''}), which compute with "
            "the sum and not with its weights: no gradient reaches them, and after a step the sum, and what is left when it is "
            "unmerged, would be wrong; call unmerge_adapter()"
        )
