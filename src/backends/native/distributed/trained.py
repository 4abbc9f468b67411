"""What is trained of a sharded model. FSDP has two forms of each parameter, of which a model shows one at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, final

from torch import nn

from ....errors import BackendError
from ..trained import TrainedWeights, require_not_merged
from .fsdp import both_forms, handles_of, in_model
from .vocabulary.rows import HeadRows

__all__ = ["TrainedShards"]


@final
class TrainedShards:
    """Which parameters of a sharded model take a gradient.

    Args:
        module: sharded, and not gathered.
        weights: what steps are made on, in the form of shards.
        rows: of the head, where it is cut and never gathered: these have one form.
    """

    def __init__(self, module: nn.Module, weights: TrainedWeights, rows: HeadRows | None) -> None:
        self._module, self._weights = module, weights
        names = {id(p): name for name, p in module.named_parameters()}
        self._rows = {names[id(p)]: p for p in ([] if rows is None else rows.parameters)}
        self._handles = {names[id(handle.sharded_param)]: handle for handle in handles_of(module)}
        self._dtypes = {name: handle.sharded_param.dtype for name, handle in self._handles.items()}
        self._switched_on = {name: bool(h.sharded_param.requires_grad) for name, h in self._handles.items()}

    @property
    def forms(self) -> dict[str, nn.Parameter]:
        """The trained weights, in every form that they have; each has a name of its own."""
        gathered = {
            f"{name} (gathered)": both_forms(handle)[-1]
            for name, handle in self._handles.items()
            if name in self._weights.parameters
        }
        return {**self._weights.parameters, **gathered}

    @property
    def frozen(self) -> list[str]:
        """Names of the weights that were trained when the backend was made, and are frozen now."""
        trained = self._weights.parameters.items()
        return [name for name, p in trained if not self._switched_on.get(name, p.requires_grad)]

    @property
    def described(self) -> str:
        """What is frozen now, in words that are the same on every rank only if that is; empty where nothing is."""
        frozen = self.frozen
        if not frozen:
            return ""
        digest = hashlib.sha256(" ".join(frozen).encode()).hexdigest()[:8]
        return f", with {len(frozen)} weights frozen since ({frozen[0]}{', ...' if frozen[1:] else ''}; {digest})"

    def settle(self) -> None:
        """Let what was switched on or off in one form of a parameter hold for the other, which the model shows later.

        Raises:
            BackendError: another parameter is in the place of one, or it has another dtype, than FSDP knows; an adapter is
                merged into weights that may be gathered, so that the sum would be forgotten with them.
        """
        require_not_merged(self._module)
        self._require_rows()
        for name, handle in self._handles.items():
            forms, before = both_forms(handle), self._switched_on[name]
            self._require_known(name, handle, forms)
            if any(form.requires_grad != before for form in forms):
                self._switched_on[name] = not before
                for form in forms:
                    form.requires_grad_(not before)

    def _require_rows(self) -> None:
        shown = dict(self._module.named_parameters()) if self._rows else {}
        for name, p in self._rows.items():
            if shown.get(name) is not p:
                raise _replaced(name, "nothing would be computed with it")

    def _require_known(self, name: str, handle: Any, forms: Sequence[nn.Parameter]) -> None:
        if not all(any(shown is form for form in forms) for shown in in_model(handle)):
            raise _replaced(name, "would be overwritten when the weights are gathered next")
        if forms[0].dtype != self._dtypes[name]:
            raise BackendError(
                f"{name} was {self._dtypes[name]} when the model was sharded, and is {forms[0].dtype}: a sharded model stays "
                "in its dtype; convert the whole model, then make the backend"
            )

    def require_summed(self, summed: bool) -> None:
        """Check that the gradients of all ranks could be added up.

        Raises:
            BackendError: only the head is left to train.
        """
        if not summed:
            raise BackendError(
                "only the head is trained, which cannot be spread over processes: the layers have been frozen since the "
                "backend was made; let one of them take a gradient, or make a backend on one process (mesh=None)"
            )

    def require_same(self) -> None:
        """Check what `TrainedWeights.require_same` does, on this rank."""
        self._weights.require_all({id(form) for form in self.forms.values()})


def _replaced(name: str, fate: str) -> BackendError:
    return BackendError(
        f"{name} was replaced after the backend was made: what is in its place now is not sharded, and {fate}; bring the old "
        "one back and change its numbers in place, or make another backend on the whole model"
    )
