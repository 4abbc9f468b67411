"""A model as it is probed: in fp32, its adapters moved from their start, its windows short; all undone afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Final

import torch
from torch import nn

from .model_facts import ModelFacts, text_config

__all__ = ["SHORT", "drawn_adapters", "in_float32", "perturbed_adapters", "shortened"]

SHORT: Final = 8  # tokens of a window that stands for a long one; half of it is still worth a shared prefix
_HALVES: Final = (torch.bfloat16, torch.float16)


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Let a half-precision model compute in fp32; its weights are cast one module at a time, and come back as they were."""
    held: dict[nn.Module, list[tuple[nn.Parameter, torch.Tensor]]] = {}

    def cast(module: nn.Module, _: Any) -> None:
        own = [p for p in module.parameters(recurse=False) if p.dtype in _HALVES]
        held.setdefault(module, [(p, p.data) for p in own])
        for p in own:
            p.data = p.data.float()

    def back(module: nn.Module, *_: Any) -> None:
        for p, data in held.pop(module, ()):
            p.data = data

    with ExitStack() as hooks:
        for module in model.modules():
            if any(p.dtype in _HALVES for p in module.parameters(recurse=False)):
                hooks.callback(module.register_forward_pre_hook(cast).remove)
                hooks.callback(module.register_forward_hook(back, always_call=True).remove)
        hooks.enter_context(_no_autocast(model))
        try:
            yield
        finally:
            for module in list(held):
                back(module)


def _no_autocast(model: nn.Module) -> Any:
    first = next(model.parameters(), None)
    return nullcontext() if first is None else torch.autocast(first.device.type, enabled=False)


@contextmanager
def perturbed_adapters(model: nn.Module, scale: float = 0.05) -> Iterator[None]:
    """Move an adapter's weights away from their start, where it changes nothing; the caller's generator is left alone."""
    with _changed_adapter(model, lambda p, noise: p + scale * noise):
        yield


@contextmanager
def drawn_adapters(model: nn.Module) -> Iterator[None]:
    """Give an adapter weights that change the model, whatever it was trained to: it may have diverged.

    Each matrix has entries of standard deviation ``1 / (2 sqrt(columns))``: about half of what it is multiplied with is left.
    """
    with _changed_adapter(model, lambda p, noise: noise / (2 * p.shape[-1] ** 0.5)):
        yield


@contextmanager
def _changed_adapter(model: nn.Module, change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Change each trained weight of an adapter, given standard normal noise; afterwards it is as it was."""
    config = getattr(getattr(model, "model", model), "peft_config", None)
    trained = [p for p in model.parameters() if p.requires_grad and p.is_floating_point()] if config else []
    before = [p.detach().clone() for p in trained]
    try:
        with torch.no_grad():
            for number, p in enumerate(trained):
                generator = torch.Generator().manual_seed(number)
                p.copy_(change(p, torch.randn(p.shape, generator=generator).to(p.device, p.dtype)))
        yield
    finally:
        with torch.no_grad():
            for p, data in zip(trained, before, strict=True):
                p.copy_(data)


@contextmanager
def shortened(model: Any) -> Iterator[ModelFacts]:
    """Give a model windows, chunks and contexts of `SHORT` tokens, so that a few tokens lie beyond; yield what it then says."""
    facts: ModelFacts = getattr(model, "facts", ModelFacts())
    config = text_config(getattr(model, "config", None))
    changed = [(config, name) for name in ("sliding_window", "attention_chunk_size") if getattr(config, name, None)]
    ropes = getattr(config, "rope_parameters", None) or {}
    nested = [one for one in ropes.values() if isinstance(one, dict)] or [ropes]
    short = [one for one in nested if one.get("rope_type") == "longrope"]
    before = [getattr(config, name) for _, name in changed]
    contexts = [one["original_max_position_embeddings"] for one in short]
    named: dict[str, Any] = {n: SHORT for n in ("window", "chunk", "longrope") if getattr(facts, n) is not None}
    now = replace(facts, **named)
    try:
        for owner, name in changed:
            setattr(owner, name, SHORT)
        for one in short:
            one["original_max_position_embeddings"] = SHORT
        if hasattr(model, "facts"):
            model.facts = now
        yield now
    finally:
        for (owner, name), value in zip(changed, before, strict=True):
            setattr(owner, name, value)
        for one, value in zip(short, contexts, strict=True):
            one["original_max_position_embeddings"] = value
        if hasattr(model, "facts"):
            model.facts = facts
