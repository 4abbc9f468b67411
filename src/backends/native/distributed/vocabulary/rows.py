"""This process's rows of a model's head, in place of the whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from .....ops.head import Head
from ...causal_lm import CausalLM
from ...models.hf import HFModel

__all__ = ["HeadRows", "why_whole"]


def why_whole(model: CausalLM) -> str | None:
    """Return why the head of a model cannot be cut by rows; None: it can.

    A forward of two tokens tells whether the rest of the model uses the head's weight too.
    """
    module = cast(nn.Module, model)
    parts = _parts(model.head())
    places = [_places(module, p) for p in parts]
    if all(places) and any(_used(model, p) for p in parts):
        return "its head is its embedding too, which every process needs whole for its tokens, so that nothing would be saved"
    output = model.causal.get_output_embeddings() if isinstance(model, HFModel) else None
    if any(len(at) != 1 or output not in (None, at[0][0]) for at in places):
        return (
            "its head is no parameter of its own: an adapter is on it, it is shared, or it is computed; leave it out of the "
            "adapter's target_modules and modules_to_save"
        )
    return None


@final
class HeadRows:
    """Rows of the head of a model: those that FSDP would keep here as a shard, and that are never gathered to score.

    Args:
        model: with a whole head of its own; see `why_whole`.
    """

    def __init__(self, model: CausalLM) -> None:
        self._module, self._form = cast(Any, model), model.head()
        self._weight, self._bias = self._form.weight, self._form.bias
        self._dtype = self._weight.dtype
        self._whole: Head | None = None
        self._mesh: DeviceMesh | None = None

    @property
    def parameters(self) -> list[Tensor]:
        """Weight, and bias if there is one."""
        return [p for p in (self._weight, self._bias) if p is not None]

    def cut(self, mesh: DeviceMesh, dtype: torch.dtype | None) -> None:
        """Keep this process's rows, and let the model's ``head()`` return them.

        Args:
            mesh: one dimension (shards) or two (replicas, shards).
            dtype: that the model computes in; None: that of its weights.
        """
        head, self._mesh = self._module.head(), mesh  # the dtype of its weights may be another one by now
        self._dtype = dtype or head.weight.dtype
        self._weight = _cut(self._module, head.weight, mesh)
        self._bias = None if head.bias is None else _cut(self._module, head.bias, mesh)
        self._module.head = self.head

    def head(self) -> Head:
        """Return this process's rows, to which gradients flow; or the whole, while it is gathered."""
        assert self._mesh is not None, "see cut"
        if self._whole is not None:
            return self._whole
        parts = [_local(p, self._dtype) for p in self.parameters]
        bias = parts[1] if self._bias is not None else None
        return self._form._replace(weight=parts[0], bias=bias, group=self._mesh.get_group(self._mesh.ndim - 1))

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Hold the whole head on every process, for what needs all logits of a position."""
        whole = [_full(p).to(self._dtype) for p in self.parameters]
        self._whole = self._form._replace(weight=whole[0], bias=whole[1] if len(whole) > 1 else None)
        try:
            yield
        finally:
            self._whole = None

    def reduce(self) -> None:
        """Add the gradients up over replicas; within a replica each process has the whole gradient of its rows."""
        assert self._mesh is not None, "see cut"
        if self._mesh.ndim == 1:
            return
        for p in self.parameters:
            if p.requires_grad:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                dist.all_reduce(cast(DTensor, p.grad).to_local(), group=self._mesh.get_group(0))


def _parts(head: Head) -> list[Tensor]:
    return [p for p in (head.weight, head.bias) if p is not None]


def _places(module: nn.Module, parameter: Tensor) -> list[tuple[nn.Module, str]]:
    """Return the modules that have a parameter, and its name there."""
    return [
        (part, name)
        for part in module.modules()
        for name, found in part.named_parameters(recurse=False, remove_duplicate=False)
        if found is parameter
    ]


def _used(model: CausalLM, parameter: Tensor) -> bool:
    """Whether hidden states depend on a parameter."""
    before = parameter.requires_grad
    parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            tokens, positions = (
                x.to(parameter.device)[None] for x in (torch.zeros(2, dtype=torch.int64), torch.arange(2))
            )
            hidden = model.hidden_states(tokens, positions)
            if not hidden.requires_grad:
                return False
            return torch.autograd.grad(hidden.sum(), [parameter], allow_unused=True)[0] is not None
    finally:
        parameter.requires_grad_(before)


def _cut(module: nn.Module, whole: Tensor, mesh: DeviceMesh) -> nn.Parameter:
    """Put this process's rows in the place of a parameter; those that `torch.chunk` gives it, as FSDP does."""
    ((owner, name),) = _places(module, whole)
    last = mesh.ndim - 1
    chunks, rank = torch.chunk(whole.detach(), mesh.size(last)), mesh.get_local_rank(last)
    own = chunks[rank].clone() if rank < len(chunks) else whole.detach()[:0].clone()
    placements = [Replicate()] * last + [Shard(0)]
    rows = DTensor.from_local(own, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())
    parameter = nn.Parameter(rows, requires_grad=whole.requires_grad)
    setattr(owner, name, parameter)
    return parameter


def _local(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    return cast(DTensor, parameter).to_local().to(dtype)


def _full(parameter: Tensor) -> Tensor:
    return cast(DTensor, parameter.detach()).full_tensor()
