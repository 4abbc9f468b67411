"""AdamW with the hyperparameters of each call; half-precision weights have fp32 masters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor, nn

from ...errors import NonFiniteError
from ..types import AdamParams
from .dtensors import full

__all__ = ["Optimizer", "forget_casts"]


def forget_casts() -> None:
    """Let autocast forget its casts of weights; to be called after every change of a weight in place."""
    torch.clear_autocast_cache()


@final
class Optimizer:
    """``torch.optim.AdamW`` over the trainable parameters.

    Gradients of half-precision parameters accumulate in fp32, and their steps are made on fp32 copies: a bf16 weight
    cannot hold a change of less than one part in 256, so it would not move at all at a small learning rate.

    Args:
        parameters: by name.

    Attributes:
        half_stepped: a step or a load failed when it had changed some weights or moments.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters
        self.half_stepped = False
        self._masters: dict[str, nn.Parameter] = {}
        for name, p in parameters.items():
            if p.dtype in (torch.bfloat16, torch.float16):
                p.grad_dtype = torch.float32
                self._masters[name] = nn.Parameter(p.detach().float())
        self._adamw = torch.optim.AdamW([self._stepped(name) for name in parameters], lr=0.0)

    def step(self, params: AdamParams, divisor: float, meet: Callable[[str], None] = lambda stage: None) -> float:
        """Step on divided and clipped copies of the gradients: if the step fails, they are what they were.

        Args:
            params: hyperparameters.
            divisor: of the gradients.
            meet: is told what has been done, before other processes are needed, and before a weight changes; raises where
                one of them has failed.

        Returns:
            The gradient norm after division and before clipping.
        """
        held = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
        scaled = torch._foreach_div(list(held.values()), divisor)
        meet("divided")
        norm = _finite_norm(scaled)
        stepped = [self._stepped(name) for name in held]
        self._configure(params)
        versions = self._versions(stepped)
        try:
            for p, gradient in zip(stepped, scaled, strict=True):
                p.grad = gradient
            if params.grad_clip_norm > 0:
                torch.nn.utils.clip_grads_with_norm_(stepped, params.grad_clip_norm, norm)
            meet("clipped")
            self._adamw.step()
            self._publish()
        except BaseException:
            self.half_stepped = versions != self._versions(stepped)
            raise
        finally:
            for (name, gradient), p in zip(held.items(), stepped, strict=True):
                p.grad = None
                self._parameters[name].grad = gradient
        return float(norm)

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Surround what replaces weights and moments: should it fail, they are neither the old nor the new ones."""
        try:
            yield
        except BaseException:
            self.half_stepped = True
            raise

    def reset(self) -> None:
        """Start cold from the present weights, which may be new."""
        forget_casts()
        self.half_stepped = False
        self._adamw.state.clear()
        for name, master in self._masters.items():
            master.data.copy_(self._parameters[name].detach())

    def to_tensors(self) -> dict[str, Tensor]:
        """Return moments, step counts and masters by ``kind:parameter``."""
        masters = {f"master:{name}": master.detach() for name, master in self._masters.items()}
        moments = {
            f"{kind}:{name}": torch.as_tensor(value)
            for name in self._parameters
            for kind, value in self._adamw.state.get(self._stepped(name), {}).items()
        }
        return masters | moments

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Take over what `to_tensors` returned."""
        self.reset()
        by_name: dict[str, dict[str, Tensor]] = {}
        for key, value in saved.items():
            kind, name = key.split(":", 1)
            by_name.setdefault(name, {})[kind] = value
        for name, found in by_name.items():
            stepped, master = self._stepped(name), found.pop("master", None)
            if master is not None:
                stepped.data.copy_(master)
            if found:
                # AdamW keeps its step count, one number, on the CPU and its moments beside the parameter.
                self._adamw.state[stepped] = {
                    k: v.reshape(()) if k == "step" else v.to(stepped.device) for k, v in found.items()
                }

    def _configure(self, params: AdamParams) -> None:
        for group in self._adamw.param_groups:
            group |= {
                "lr": params.learning_rate,
                "betas": (params.beta1, params.beta2),
                "eps": params.eps,
                "weight_decay": params.weight_decay,
            }

    def _stepped(self, name: str) -> nn.Parameter:
        return self._masters.get(name, self._parameters[name])

    def _versions(self, stepped: Sequence[nn.Parameter]) -> int:
        """Return a number that grows with every change of these weights and of their moments."""
        moments = [m for p in stepped for m in self._adamw.state.get(p, {}).values() if isinstance(m, Tensor)]
        return sum(tensor._version for tensor in (*stepped, *moments))

    @torch.no_grad()
    def _publish(self) -> None:
        for name, master in self._masters.items():
            self._parameters[name].copy_(master)
        forget_casts()


def _finite_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the norm over all gradients of all processes."""
    norm = full(torch.nn.utils.get_total_norm(gradients))
    if not bool(torch.isfinite(norm)):
        raise NonFiniteError(
            f"the norm of the gradient is {float(norm)}, though each number is finite; nothing has changed"
        )
    return norm
