"""Several processes that train one model, against as many that train alone on the same tokens."""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pullback import AdamParams, Datum, TorchBackend
from pullback.backends.native import HFModel
from pullback.backends.native.distributed.ranks import Ranks
from pullback.cli.processes import Processes
from pullback.testing import random_llama

from .models import batch
from .timing import Report, Times, taken

__all__ = ["run"]

_LENGTH: Final = 256  # tokens of a sequence
_PARAMS: Final = AdamParams(learning_rate=1e-7, grad_clip_norm=1.0)  # the weights stay where they are
_CONFIG: Final[Mapping[str, int]] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def run(arguments: Any) -> None:
    """Start the processes, or be one of them."""
    if "RANK" not in os.environ:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(arguments.ranks)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
        subprocess.run([*command, "-m", "benchmarks", *sys.argv[1:]], check=True, env=environment)
        return
    processes = Processes.here()
    assert processes.ranks is not None, "--ranks must be at least 2"
    report = Report("distributed")
    for tokens in map(int, arguments.tokens.split(",")):
        _case(processes.ranks, tokens, arguments, report if processes.first else None)
    if processes.first:
        report.close()


def _case(ranks: Ranks, tokens: int, arguments: Any, report: Report | None) -> None:
    """Time one number of tokens a process, and report on rank 0."""
    length = min(_LENGTH, tokens)
    data = batch([length] * (tokens // length * ranks.size), _CONFIG["vocab_size"], prompt_share=0.0)
    own = data[ranks.rank :: ranks.size]
    backends = {
        "alone": TorchBackend(_model(), mesh=None, token_budget=tokens),
        "together": TorchBackend(_model(), reshard=arguments.reshard, token_budget=tokens),
    }
    works = {name: _step(backend, own if name == "alone" else data) for name, backend in backends.items()}
    times, cpu = _interleaved(ranks, works, arguments.rounds)
    with counting() as sent:
        works["together"]()
    weights = sum(p.numel() * p.element_size() for p in backends["alone"].model.parameters())
    if report is None:
        return
    shares = [a / t for a, t in zip(times.seconds["alone"], times.seconds["together"], strict=True)]
    facts = {
        "processes": ranks.size,
        "tokens a process": tokens,
        "parameters": weights // 4,
        "steps/s of independent processes": round(statistics.median(shares), 3),
        "CPU time of independent processes": round(cpu.ratio("together", "alone"), 3),
        "bytes sent a process": sum(sent.values()),
        "least, 2P(n-1)/n": 2 * weights * (ranks.size - 1) // ranks.size,
        "by operation": dict(sent),
    }
    report.add(f"{tokens} tokens a process, reshard={arguments.reshard}", times, "alone", facts)


def _model() -> HFModel:
    return HFModel(random_llama(dtype=torch.float32, tie_word_embeddings=True, **_CONFIG))


def _step(backend: TorchBackend, data: list[Datum]) -> Callable[[], object]:
    def work() -> None:
        backend.forward_backward(data, "cross_entropy").result()
        backend.optim_step(_PARAMS).result()

    return work


def _interleaved(ranks: Ranks, works: Mapping[str, Callable[[], object]], rounds: int) -> tuple[Times, Times]:
    """Time the works on all processes at once, in random order; one round before does not count.

    Independent processes together make as many steps a second as the harmonic mean of their times says; joint ones end when
    the last one does. The CPU time of all processes is returned too: what others do to this machine, it does not show.
    """
    times, cpu = (Times({name: [] for name in works}, {name: [] for name in works}) for _ in range(2))
    order = random.Random(0)  # the same on every process
    for round_ in range(rounds + 1):
        for name in order.sample(list(works), len(works)):
            ranks.gather(torch.zeros(1))  # all begin at once
            began = time.process_time()
            seconds, others = taken(works[name], "wall")
            own = [seconds, others, time.process_time() - began]
            every = ranks.gather(torch.tensor(own, dtype=torch.float64))
            if round_:
                mean = statistics.harmonic_mean(every[:, 0].tolist())
                times.seconds[name].append(mean if name == "alone" else float(every[:, 0].max()))
                times.others[name].append(float(every[:, 1].mean()))
                cpu.seconds[name].append(float(every[:, 2].sum()))
    return times, cpu


@contextmanager
def counting() -> Iterator[dict[str, int]]:
    """Count the bytes that this process must send, by operation, whatever the transport makes of them."""
    counter = _Counter()
    with counter:
        yield counter.sent


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sent: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")
        if name[0] == "c10d":
            size = torch.distributed.get_world_size()
            operation = name[2].partition(".")[0].strip("_")
            self.sent[operation] = self.sent.get(operation, 0) + _bytes(operation, args, size)
        return func(*args, **(kwargs or {}))


def _bytes(operation: str, args: Any, size: int) -> int:
    """Return what one of ``size`` processes sends at least in a collective."""
    first, second = (_total(each) for each in args[:2])
    if "reduce_scatter" in operation:  # output, input
        return second * (size - 1) // size
    if "allgather" in operation:  # output, input
        return second * (size - 1)
    if "allreduce" in operation:
        return 2 * first * (size - 1) // size
    return first if torch.distributed.get_rank() == 0 else 0  # a broadcast


def _total(given: Any) -> int:
    if isinstance(given, torch.Tensor):
        return given.numel() * given.element_size()
    return sum(map(_total, given)) if isinstance(given, (list, tuple)) else 0
