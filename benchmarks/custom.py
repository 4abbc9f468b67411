"""A custom function against the built-in loss of the same maths: time, FLOPs, memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pullback import Datum, TorchBackend

from .models import batch, load
from .timing import Clock, Report, interleave

__all__ = ["run"]


def nll(data: Sequence[Any], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy as a user would write it."""
    weights = torch.cat([d.loss_fn_inputs["weights"].to_torch() for d in data])
    return -torch.dot(weights, torch.cat(logprobs)), {}


def flops(work: Callable[[], object]) -> int:
    """Counted, not predicted."""
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


@dataclass
class Pair:
    """The two ways to the same gradient."""

    backend: TorchBackend
    data: list[Datum]

    def built_in(self) -> Any:
        """By name."""
        return self._finished(self.backend.forward_backward(self.data, "cross_entropy"))

    def custom(self) -> Any:
        """By function."""
        return self._finished(self.backend.forward_backward_custom(self.data, nll))

    def _finished(self, future: Any) -> Any:
        output = future.result()
        self.backend.discard_gradients()
        return output


def run(arguments: Any) -> None:
    """LoRA (frozen head) and full tuning (trained head), whole and with half the activation budget."""
    report = Report("custom")
    for lora, kind in ((8, "LoRA, frozen head"), (None, "trained head")):
        backend = load(arguments.model, lora=lora, token_budget=arguments.token_budget)
        data = batch([arguments.length] * arguments.sequences, backend.vocab_size, prompt_share=0.0)
        pair = Pair(backend, data)
        held = pair.custom().metrics["graph_bytes:max"]
        _case(report, f"{arguments.model}, {kind}", pair, pair, arguments.rounds, arguments.clock)
        small = load(arguments.model, lora=lora, token_budget=arguments.token_budget, activation_budget=held / 2)
        name = f"{arguments.model}, {kind}, half the activation budget"
        _case(report, name, pair, Pair(small, data), max(1, arguments.rounds // 3), arguments.clock)
    report.close()


def _case(report: Report, name: str, whole: Pair, own: Pair, rounds: int, clock: Clock) -> None:
    times = interleave({"built-in": whole.built_in, "custom": own.custom}, rounds, clock)
    plan, metrics = own.backend.plan(nll, own.data), own.custom().metrics
    facts = {
        "flops_ratio": round(flops(own.custom) / flops(whole.built_in), 4),
        "tokens": sum(len(d.model_input) for d in own.data),
        "graph_mb": round(metrics["graph_bytes:max"] / 1e6),
        "graph_predicted": round(plan.graph_bytes / metrics["graph_bytes:max"], 3),
        "recomputed": metrics["recomputed_tokens:sum"],
    }
    report.add(name, times, "built-in", facts)
