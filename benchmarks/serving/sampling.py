"""Calls for one completion each: all at once against one after another, and against one call for all of them."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..timing import Report, interleave
from .services import own_service

__all__ = ["measure", "run"]

Answer = tuple[list[int], list[float]]  # tokens, log-probs
_NAMES = ("one after another", "all at once", "one call")


def run(arguments: Any) -> None:
    """Measure a service of our own, and print."""
    os.environ.setdefault("TINKER_TELEMETRY", "0")
    report = Report("sampling")
    with own_service(arguments.model, arguments.model, 512) as own:
        measure(
            report, own.url, arguments.model, arguments.calls, arguments.prompts, arguments.tokens, arguments.rounds
        )
    report.close()


def measure(report: Report, url: str, model: str, calls: int, prompts: int, tokens: int, rounds: int) -> None:
    """Sample from the base model of a service, and add what it took to the report.

    Args:
        report: takes the times, and tokens per second of each way.
        url: of the service.
        model: name of its base model.
        calls: for one completion each.
        prompts: different ones among them, of 16 tokens.
        tokens: of each completion.
        rounds: that count.
    """
    import tinker

    generator = torch.Generator().manual_seed(0)
    texts = [
        tinker.ModelInput.from_ints(torch.randint(3, 60, (16,), generator=generator).tolist()) for _ in range(prompts)
    ]
    with tinker.ServiceClient(base_url=url, api_key="tml-none") as client:
        sampler = client.create_sampling_client(base_model=model).result()
        found: dict[str, list[Answer]] = {}

        def ask(i: int, n: int = 1) -> Any:
            params = tinker.SamplingParams(max_tokens=tokens, seed=i, stop=[])
            return sampler.sample(texts[i % prompts], n, params)

        def one_after_another() -> None:
            found["alone"] = [_answer(ask(i).result()) for i in range(calls)]

        def all_at_once() -> None:
            futures = [ask(i) for i in range(calls)]
            found["together"] = [_answer(future.result()) for future in futures]

        works = (one_after_another, all_at_once, lambda: ask(0, calls).result())
        times = interleave(dict(zip(_NAMES, works, strict=True)), rounds)
    rates = {f"tokens/s {name}": round(calls * tokens / statistics.median(s)) for name, s in times.seconds.items()}
    report.add(f"{calls} completions of {tokens} tokens", times, _NAMES[0], {**rates, **_compared(found)})


def _answer(response: Any) -> Answer:
    (sequence,) = response.sequences
    return list(sequence.tokens), list(sequence.logprobs)


def _compared(found: Mapping[str, Sequence[Answer]]) -> dict[str, Any]:
    """Return the share of answers that differ, and how far log-probs differ before the first token that does, nats."""
    differing, distance = 0, 0.0
    for (alone, scores), (together, others) in zip(found["alone"], found["together"], strict=True):
        differing += alone != together
        same = next((i for i, (a, b) in enumerate(zip(alone, together, strict=False)) if a != b), len(alone))
        distance = max([distance, *(abs(a - b) for a, b in zip(scores[:same], others[:same], strict=True))])
    return {"differing answers": f"{differing / len(found['alone']):.1%}", "log-probs differ by": distance}
