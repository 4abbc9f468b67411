"""Time one training step, built-in against custom, interleaved in one run.

A table for people; the last line is one JSON document. Only the ratio means anything on a shared machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pullback import Datum, ModelInput, TorchBackend
from pullback.testing import TinyLM


def nll(data: Sequence[Any], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy as a user would write it."""
    return -torch.cat(logprobs).sum(), {}


def make_data(sequences: int, length: int, vocab: int) -> list[Datum]:
    """Random sequences, every position trained."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab, (sequences, length + 1), generator=generator)
    return [Datum(ModelInput.from_ints(row[:-1]), {"target_tokens": row[1:]}) for row in tokens]


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    """Run the benchmark that was asked for."""
    parser = argparse.ArgumentParser(prog="benchmarks")
    parser.add_argument("what", choices=("step",))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    arguments = parser.parse_args()
    model = TinyLM(4096, hidden=128, layers=4, heads=4, max_positions=arguments.length, dtype=torch.float32)
    backend = TorchBackend(model.to("cuda" if torch.cuda.is_available() else "cpu"))
    data = make_data(arguments.sequences, arguments.length, 4096)
    works: dict[str, Callable[[], object]] = {
        "forward": lambda: backend.forward(data).result(),
        "built-in": lambda: backend.forward_backward(data, "cross_entropy").result(),
        "custom": lambda: backend.forward_backward_custom(data, nll).result(),
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for round_ in range(arguments.rounds + 1):
        for name, work in works.items():
            taken = seconds(work)
            backend.discard_gradients()
            if round_:  # the first round warms up
                times[name].append(taken)
    print(f"{'':10}{'p20 ms':>10}{'p50 ms':>10}{'p80 ms':>10}")
    for name, found in times.items():
        low, middle, high = (1e3 * statistics.quantiles(found, n=10)[q] for q in (1, 4, 7))
        print(f"{name:10}{low:10.1f}{middle:10.1f}{high:10.1f}")
    ratios = [a / b for a, b in zip(times["custom"], times["built-in"], strict=True)]
    result = {
        "custom_over_built_in_p50": statistics.median(ratios),
        "seconds": times,
        "tokens": arguments.sequences * arguments.length,
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    print(f"custom / built-in: {result['custom_over_built_in_p50']:.2f} (median of paired rounds)")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
