"""What PyTorch's FSDP2 has no public name for: its groups of parameters, and the gradients that they hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..dtensors import local_part
from .ranks import Ranks

__all__ = [
    "Reached",
    "both_forms",
    "forget_gradients",
    "forget_pass",
    "gathered_dtype",
    "groups_of",
    "handles_of",
    "holds_gradients",
    "in_model",
    "units_of",
]


def units_of(module: nn.Module) -> Iterator[FSDPModule]:
    """Yield the parts of a model that are gathered one by one."""
    return (part for part in module.modules() if isinstance(part, FSDPModule))


def gathered_dtype(module: nn.Module) -> torch.dtype | None:
    """Return FSDP's dtype of gathered weights, which has no public name; None: that of the shards, or there are none."""
    if not isinstance(module, FSDPModule):
        return None
    state: Any = module._get_fsdp_state()
    return cast("torch.dtype | None", state._mp_policy.param_dtype)


def both_forms(parameter: Any) -> list[nn.Parameter]:
    """The sharded and the gathered form of a parameter, where there is one."""
    gathered = getattr(parameter, "_unsharded_param", None)
    return [parameter.sharded_param] if gathered is None else [parameter.sharded_param, gathered]


def groups_of(module: nn.Module) -> Iterator[Any]:
    """FSDP's groups of parameters, which have no public name."""
    for unit in units_of(module):
        state: Any = unit._get_fsdp_state()
        groups: Sequence[Any] = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        yield from (group for group in groups if group is not None)


def handles_of(module: nn.Module) -> list[Any]:
    """Return FSDP's own objects that stand for parameters, in the same order on every rank."""
    return [parameter for group in groups_of(module) for parameter in group.fsdp_params]


def in_model(parameter: Any) -> list[nn.Parameter | None]:
    """Return what a model has now in each of the places of a parameter."""
    at = parameter._module_info
    places = [(at.module, at.param_name), *zip(at.shared_modules, at.shared_param_names, strict=True)]
    return [getattr(module, name, None) for module, name in places]


def holds_gradients(module: nn.Module) -> bool:
    """Whether a gathered parameter holds a gradient, which the next sum over all ranks would take up."""
    return any(g is not None for p in handles_of(module) for g in (_gathered_gradient(p), p.unsharded_accumulated_grad))


def forget_gradients(module: nn.Module) -> None:
    """Drop the gradients that gathered parameters hold; those of the shards stay."""
    for parameter in handles_of(module):
        parameter.unsharded_accumulated_grad = None
        if hasattr(parameter, "_unsharded_param"):  # may hold a gradient that was not reduced, gathered or not
            parameter._unsharded_param.grad = None


def forget_pass(module: nn.Module) -> None:
    """Bring a sharded module back to where it was before a pass that failed half-way, gradients that it holds included."""
    forget_gradients(module)
    _reset_iteration(cast(FSDPModule, module))


@final
class Reached:
    """Which parameters the backwards of an operation have reached, on any rank.

    A rank's gradients must have the same places as all others', so they are filled with zeros. The optimizer, however, would
    decay and move what has a gradient of zeros, and leaves alone what has none.

    Args:
        module: sharded.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._watched: set[Any] = set()
        self._reached: set[Any] = set()
        self._ignores = False

    def watch(self) -> None:
        """Look out for the gradients of what has been gathered by now."""
        for parameter in handles_of(self._module):
            gathered = getattr(parameter, "_unsharded_param", None)
            if gathered is not None and gathered.requires_grad and parameter not in self._watched:
                gathered.register_post_accumulate_grad_hook(partial(self._see, parameter))
                self._watched.add(parameter)

    @contextmanager
    def ignoring(self) -> Iterator[None]:
        """Take no note of what is reached in the meantime."""
        self._ignores = True
        try:
            yield
        finally:
            self._ignores = False

    def forget(self) -> None:
        """Begin anew."""
        self._reached.clear()

    def taken(self, ranks: Ranks) -> list[bool]:
        """Return for each parameter whether any rank has reached it, and begin anew."""
        own = torch.tensor([parameter in self._reached for parameter in handles_of(self._module)])
        self.forget()
        found: list[bool] = ranks.gather(own).any(0).tolist()
        return found

    def drop_others(self, reached: Sequence[bool], ranks: Ranks) -> None:
        """Take the gradient of zeros from the shards of each parameter that no rank has reached."""
        shards = [parameter.sharded_param for parameter in handles_of(self._module)]
        others = [p for p, seen in zip(shards, reached, strict=True) if not seen and p.requires_grad]
        if not others:  # on no rank, as what has been reached is known to all
            return
        zero = [p.grad is not None and not bool(local_part(p.grad).any()) for p in others]
        everywhere = ranks.gather(torch.tensor(zero)).all(0).tolist()
        for p, empty in zip(others, everywhere, strict=True):
            if empty:
                p.grad = None

    def _see(self, parameter: Any, _: Tensor) -> None:
        if not self._ignores:
            self._reached.add(parameter)


def _gathered_gradient(parameter: Any) -> Tensor | None:
    gathered: Tensor | None = getattr(parameter, "_unsharded_param", None)
    return None if gathered is None else gathered.grad


def _reset_iteration(root: FSDPModule) -> None:
    """Bring FSDP's own state back to between two operations."""
    if hasattr(root, "reset_iter_state"):  # since torch 2.13
        root.reset_iter_state()
        return
    from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

    state: Any = root._get_fsdp_state()
    state._comm_ctx.post_forward_order.clear()
    state._state_ctx.iter_forward_root = None
    state._state_ctx.post_backward_final_callback_queued = False
    for each in state._state_ctx.all_states:
        each._training_state = TrainingState.IDLE
    for group in groups_of(cast(nn.Module, root)):
        group._training_state = TrainingState.IDLE
        group._post_forward_indices.clear()
        group._all_gather_result = None
