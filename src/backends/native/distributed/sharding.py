"""A model's weights and gradients over many processes, by PyTorch's FSDP2."""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, cast, final

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from ....errors import BackendError, UnsupportedError
from ..causal_lm import CausalLM
from ..dtensors import local_part
from ..execution.memory import GraphMeter
from ..execution.scaling import autocasts_to_fp16
from ..models.hf import HFModel
from ..optimizer import forget_casts
from .fsdp import (
    Reached,
    both_forms,
    forget_gradients,
    forget_pass,
    gathered_dtype,
    groups_of,
    holds_gradients,
    units_of,
)
from .ranks import Ranks
from .vocabulary.rows import HeadRows

__all__ = [
    "Reshard",
    "Shards",
    "require_no_fp16",
    "shard_model",
    "sharded_units",
    "whole_bytes",
]

Reshard = Literal["auto"] | bool
_HALVES = (torch.bfloat16, torch.float16)
_NO_FLOAT16 = "float16 needs a loss scale that all processes share, which is not built; use bfloat16"
_FORWARDS = ("hidden_states", "cached_states")


def shard_model(module: nn.Module, mesh: DeviceMesh, frozen: bool = True, rows: HeadRows | None = None) -> None:
    """Shard each layer, and one root over the base model and the head; gradients are summed over ranks, not averaged.

    Trained weights in bfloat16 become fp32 shards, which compute in bfloat16: the shard is what an optimizer on one process
    keeps as its fp32 master.

    Args:
        module: a `CausalLM`; its adapters must be there already.
        mesh: one dimension (shards) or two (replicas, shards).
        frozen: frozen weights are sharded too; False: each rank keeps them as they are.
        rows: of its head, if that is to be cut and never gathered.

    Raises:
        UnsupportedError: float16, or weights of several dtypes that are trained.
    """
    if isinstance(module, HFModel) and module.is_lora:
        # Found by where they lie in memory, which is no longer known once they are sharded.
        module.outside = frozenset(module.trained_outside())
    kept: set[Any] = set() if frozen else {p for p in module.parameters() if not p.requires_grad}
    policy = _as_masters(module, kept)
    if rows is not None:
        rows.cut(mesh, policy.param_dtype)
    kept |= set() if rows is None else {*rows.parameters}
    for layer in sharded_units(module):
        fully_shard(layer, mesh=mesh, mp_policy=policy, ignored_params=kept)
    fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=kept)
    for name in _FORWARDS:
        if hasattr(module, name):
            register_fsdp_forward_method(module, name)
    for unit in units_of(module):
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo cannot multiply as it sums
        getattr(unit, "set_reduce_scatter_unused_params", lambda _: None)(True)  # since torch 2.13


def require_no_fp16(device: torch.device) -> None:
    """Refuse gradients under an autocast to float16, which small ones do not survive without a scale.

    Raises:
        UnsupportedError: there is one now.
    """
    if autocasts_to_fp16(device):
        raise UnsupportedError(f"torch.autocast computes in float16 here; {_NO_FLOAT16}")


def sharded_units(module: nn.Module) -> list[nn.Module]:
    """Return the layers of a model: what transformers would not split, or else the members of its longest list."""
    names = {name for part in module.modules() for name in (getattr(part, "_no_split_modules", None) or ()) if name}
    layers = [part for part in module.modules() if type(part).__name__ in names]
    lists = [list(part) for part in module.modules() if isinstance(part, nn.ModuleList) and len(part) > 0]
    found = layers or max(lists, key=len, default=[])
    inner = {child for part in found for child in part.modules() if child is not part}
    return [part for part in found if part not in inner]


def _as_masters(module: nn.Module, kept: Set[nn.Parameter]) -> MixedPrecisionPolicy:
    trained = {p.dtype for p in module.parameters() if p.requires_grad}
    if torch.float16 in {p.dtype for p in module.parameters()}:
        raise UnsupportedError(_NO_FLOAT16)
    if not trained & set(_HALVES):
        return MixedPrecisionPolicy(cast_forward_inputs=False)
    every = {p.dtype for p in module.parameters()}
    if len(every) > 1:
        raise UnsupportedError(
            f"trained weights in bfloat16 beside others ({', '.join(sorted(map(str, every)))}) cannot be sharded together; "
            "load the model in one dtype, or train an adapter"
        )
    # Buffers, like what is kept, are never gathered: they stay what the model computes with.
    for p in module.parameters():
        if p not in kept:
            p.data = p.data.float()
    return MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)


def whole_bytes(module: nn.Module) -> int:
    """Return the bytes of a model's weights, and of their gradients (at least fp32) where they are trained."""
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    return weights + sum(p.numel() * max(p.element_size(), 4) for p in module.parameters() if p.requires_grad)


@final
class Shards:
    """A sharded model: when its weights are gathered, and when its gradients are reduced.

    Without resharding, the weights are gathered once after each step and stay until the next: an operation then
    computes on each rank as if it were alone, may fail or run out of memory there, and gradients are reduced once, after all
    ranks have agreed that they are good. With resharding, each layer is gathered for as long as it computes, so that every
    rank must run as many forwards, in the same order.

    Args:
        module: that `shard_model` has sharded.
        model: the same.
        reshard: whether layers are freed after each forward and backward.
        meter: is told where weights lie.
        rows: of the head, where it is cut: every rank must then run as many forwards in any case, as ranks score together.
    """

    def __init__(
        self,
        module: nn.Module,
        model: CausalLM,
        reshard: bool,
        meter: GraphMeter | None,
        rows: HeadRows | None = None,
    ) -> None:
        self.reshard, self.module, self.model, self._meter, self.rows = reshard, module, model, meter, rows
        self.in_step = reshard or rows is not None
        self._root = cast(FSDPModule, module)
        self._gathered, self._reached = False, Reached(module)
        self.masters = gathered_dtype(module) is not None  # fp32 shards that compute in half precision
        self._root.set_reshard_after_forward(reshard)
        self._root.set_reshard_after_backward(reshard)
        # The head is used outside of the root's forward.
        self._root.set_reshard_after_forward(False, recurse=False)
        self._root.set_reshard_after_backward(False, recurse=False)
        self._root.set_requires_gradient_sync(reshard)
        self._trained = any(p.requires_grad for p in module.parameters())
        hidden = self._dummy()  # also lets FSDP find its root
        self.dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32  # of log-probs
        if self._trained and not hidden.requires_grad:
            raise UnsupportedError("only the head is trained, which cannot be spread over processes; train a layer too")
        self.release()

    def gather(self) -> None:
        """Gather the weights on every rank; with resharding, only those outside of the layers."""
        if self._gathered:
            return
        for unit in [self._root] if self.reshard else [*units_of(self.module)]:
            unit.unshard()
        self._gathered = True
        self._reached.watch()
        if self._meter is not None and not self.reshard:
            self._meter.owned = GraphMeter.of(self.module).owned

    def release(self) -> None:
        """Free what was gathered; the weights may now change."""
        for unit in units_of(self.module):
            unit.reshard()
        self._gathered = False

    def whole_head(self) -> AbstractContextManager[None]:
        """Hold all rows of the head on every rank."""
        return nullcontext() if self.rows is None else self.rows.gathered()

    @contextmanager
    def keeping_trained(self) -> Iterator[None]:
        """Keep which weights are trained, of each of which FSDP has two; PEFT switches the one of the moment off and on."""
        held = [p for group in groups_of(self.module) for each in group.fsdp_params for p in both_forms(each)]
        flags = [p.requires_grad for p in held]
        try:
            yield
        finally:
            for p, flag in zip(held, flags, strict=True):
                p.requires_grad_(flag)

    @contextmanager
    def casting_anew(self) -> Iterator[None]:
        """Keep autocast from remembering its casts of weights that are freed and gathered again.

        A backward reaches the weight behind a remembered cast last, when FSDP has added up the gradients of its layer
        already, so that this one would be lost; and the casts would take the memory that resharding is to save.
        """
        before = torch.is_autocast_cache_enabled()
        if self.reshard:
            forget_casts()
            torch.set_autocast_cache_enabled(False)
        try:
            yield
        finally:
            torch.set_autocast_cache_enabled(before)

    def standing_in(self) -> AbstractContextManager[None]:
        """Run a backward that stands for no datum: what it reaches counts as reached by nobody."""
        return self._reached.ignoring()

    def require_own_gradients(self) -> None:
        """Check that no gradient waits that another than this backend has made.

        Raises:
            BackendError: one does.
        """
        if holds_gradients(self.module):
            raise BackendError(
                "a gradient that has not accumulated here waits in the model: backward() outside of this backend has made it; "
                "call discard_gradients() and make the calls since the last step again"
            )

    def forget_gradients(self) -> None:
        """Drop the gradients that wait in the model, whoever has made them."""
        forget_gradients(self.module)
        self._reached.forget()

    def reduce(self, ranks: Ranks, frozen: bool) -> bool:
        """Add the gradients of all ranks up, each rank keeping its shards; what none of them has reached has no gradient.

        Returns: whether that can be done. What the head alone has is added up nowhere; layers may have been ``frozen`` since.
        """
        if self.rows is not None:
            self.rows.reduce()
        reached = self._reached.taken(ranks)
        if any(reached) and not (self._reaches_layers(frozen) if self.reshard else self._reduce_once()):
            return False
        if not self.reshard:
            self.forget_gradients()  # zeros that a remembered cast has handed on late
        self._reached.drop_others(reached, ranks)
        return True

    def _reaches_layers(self, frozen: bool) -> bool:
        """Whether a backward reaches layers; each has been added up by then."""
        if not frozen:
            return True
        reaches = self._dummy().requires_grad
        self.reset()
        return reaches

    def _reduce_once(self) -> bool:
        for p in self.module.parameters():
            if p.requires_grad and p.grad is None:
                p.grad = torch.zeros_like(p)
        self._root.set_requires_gradient_sync(True)
        try:
            hidden = self._dummy()
            if hidden.requires_grad:
                torch.autograd.backward(hidden, torch.zeros_like(hidden))
        finally:
            self._root.set_requires_gradient_sync(False)
        return hidden.requires_grad

    @contextmanager
    def resetting(self) -> Iterator[None]:
        """Bring everything back to before what runs here, if it fails; gradients of earlier operations stay."""
        try:
            yield
        except BaseException:
            self.reset()
            raise

    def reset(self) -> None:
        """Forget an operation that failed half-way, with its gradients; those of earlier operations stay."""
        forget_pass(self.module)
        self._reached.forget()
        self.release()

    def _dummy(self) -> Tensor:
        """Return hidden states of two tokens, which depend on every weight of the base model."""
        device = next(local_part(p) for p in self.module.parameters()).device
        with torch.set_grad_enabled(self._trained):
            return self.model.hidden_states(
                torch.zeros(1, 2, dtype=torch.int64, device=device), torch.arange(2, device=device)[None]
            )
