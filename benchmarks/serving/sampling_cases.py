"""Sampling at a service: the loop of reinforcement learning, and clients that each have an adapter of their own."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Final

from pullback import Datum, ModelInput, SamplingParams

from .load import Measured, timed
from .place import STEP, Place, Sizes, table

__all__ = ["adapters", "reinforcement"]

_ADAPTERS: Final = 8


def adapters(place: Place, sizes: Sizes) -> dict[str, Any]:
    """Completions for clients on adapters of their own: one client after another, all together, and all on one adapter."""
    number = min(_ADAPTERS, max(sizes.clients))
    prompts = [datum.model_input for datum in place.batch(number, max(2, sizes.length // 2))]
    params = SamplingParams(max_tokens=sizes.max_tokens, stop=[])
    found: dict[str, list[Measured]] = {}
    with ExitStack() as stack:
        clients = [stack.enter_context(place.client()) for _ in range(number)]

        def draw(asking: Sequence[Any], asked: Sequence[ModelInput]) -> None:
            sent = [c.sample([p], sizes.completions, params) for c, p in zip(asking, asked, strict=True)]
            assert all(len(one.tokens) == sizes.max_tokens for answer in sent for one in answer.result())

        works: dict[str, Callable[[], object]] = {
            "one after another": lambda: list(map(draw, [[c] for c in clients], [[p] for p in prompts])),
            "together": lambda: draw(clients, prompts),
            "all on one adapter": lambda: draw(clients[:1] * number, prompts),
        }
        for round_ in range(sizes.rounds + 1):
            for name, work in works.items():
                seconds = timed(work)
                if round_:
                    found.setdefault(name, []).append(Measured(seconds, [seconds]))
    words = f"{number} clients with an adapter each, {sizes.completions} completions of {sizes.max_tokens} tokens"
    rows = table("adapters", words, found, "one after another")
    tokens = number * sizes.completions * sizes.max_tokens
    rates = {name: tokens * row["rate"] for name, row in rows["rows"].items()}
    print("  tokens/s: " + ", ".join(f"{rate:,.0f} {name}" for name, rate in rates.items()), flush=True)
    return {**rows, "tokens/s": rates}


def reinforcement(place: Place, sizes: Sizes) -> dict[str, Any]:
    """Sample, learn from what was sampled, step; and the same on the native backend."""
    prompts = [datum.model_input for datum in place.batch(2, max(2, sizes.length // 2))]
    found: dict[str, list[Measured]] = {}
    with place.client() as client:
        sides = {"native": place.native(), "service": client}
        for round_ in range(sizes.rounds + 1):
            for name, backend in sides.items():
                for phase, seconds in _loop(backend, prompts, sizes).items():
                    if round_:
                        found.setdefault(f"{name}: {phase}", []).append(Measured(seconds, [seconds]))
    words = f"{len(prompts)} prompts x {sizes.completions} completions of {sizes.max_tokens} tokens"
    return table("rl", words, found, "native: whole loop")


def _loop(backend: Any, prompts: Sequence[ModelInput], sizes: Sizes) -> dict[str, float]:
    params = SamplingParams(max_tokens=sizes.max_tokens, stop=[])
    began = time.perf_counter()
    rollouts = backend.sample(prompts, sizes.completions, params).result()
    sampled = time.perf_counter()
    data = [_datum(prompts[i // sizes.completions], rollout, i) for i, rollout in enumerate(rollouts)]
    backend.forward_backward(data, "importance_sampling").result()
    learned = time.perf_counter()
    backend.optim_step(STEP).result()
    ended = time.perf_counter()
    phases = {"sample": sampled - began, "forward_backward": learned - sampled, "optim_step": ended - learned}
    return {**phases, "whole loop": ended - began}


def _datum(prompt: ModelInput, rollout: Any, place: int) -> Datum:
    before = len(prompt) - 1
    tokens = [*prompt.tokens.tolist(), *rollout.tokens]
    trained, sign = [0.0] * before + [1.0] * len(rollout.tokens), 1.0 if place % 2 else -1.0
    inputs: dict[str, Any] = {
        "target_tokens": tokens[1:],
        "weights": trained,
        "advantages": [sign * w for w in trained],
        "logprobs": [0.0] * before + list(rollout.logprobs),
    }
    return Datum(ModelInput.from_ints(tokens[:-1]), inputs)
