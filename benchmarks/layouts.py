"""How sequences of one forward are laid out: packed, forked where pairs share their prompt, padded, one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pullback import Datum, ModelInput, TorchBackend
from pullback.losses import DPO

from .models import batch, load
from .timing import Report, interleave

__all__ = ["LAYOUTS", "run"]

LENGTHS = [64, 256, 96, 192, 128, 224, 160, 240]
LAYOUTS = ("packed", "forked", "padded", "single")


def sharing(data: list[Datum], share: float) -> list[Datum]:
    """Give the second of each pair the prefix of the first, so much of the shorter one."""
    found = []
    for first, second in zip(data[0::2], data[1::2], strict=True):
        size = int(share * min(len(first.model_input), len(second.model_input)))
        tokens = torch.cat([first.model_input.tokens[:size], second.model_input.tokens[size:]])
        found += [first, Datum(ModelInput.from_ints(tokens), second.loss_fn_inputs)]
    return found


def run(arguments: Any) -> None:
    """Time a DPO step of pairs that share nothing, or some of their shorter side."""
    model: Any = load(arguments.model, lora=8).model
    names: list[Any] = arguments.layouts.split(",")
    backends: dict[str, TorchBackend] = {
        name: TorchBackend(model, layout=name, token_budget=arguments.token_budget) for name in names
    }
    lengths = [LENGTHS[i % len(LENGTHS)] for i in range(arguments.sequences)]
    report = Report("layouts")
    for share in (float(s) for s in arguments.shares.split(",")):
        data = sharing(batch(lengths, backends[names[0]].vocab_size), share)

        def step(name: str, data: list[Datum] = data) -> None:
            backends[name].forward_backward(data, DPO()).result()
            backends[name].discard_gradients()

        works: dict[str, Callable[[], object]] = {name: lambda name=name: step(name) for name in names}  # type: ignore[misc]
        times = interleave(works, arguments.rounds, arguments.clock)
        tokens = {name: backends[name].plan(DPO(), data).tokens for name in names}
        report.add(f"{arguments.model} LoRA dpo, {share:.0%} shared", times, names[0], {"tokens": tokens})
    report.close()
