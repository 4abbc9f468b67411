"""What a custom loss may take: bytes and operations are counted before anything runs, whatever the graph is."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
import tracemalloc
from typing import Any

import pytest
import torch
from clients.graphs import REF, Meter, call, loss_body
from clients.planted_graphs import PLANTED
from tiers import SOAK
from torch import Tensor

from pullback.datums import Datum, ModelInput
from pullback.errors import ConfigError, TooLargeError
from pullback.service.custom_loss.budget import PER_NODE, Budget, Cost
from pullback.service.custom_loss.interpreter import LossGraph

MOST_BYTES = 100_000_000  # that a small request may take, all of its tensors together
NUMBERS = [0.5] * 100


def run(nodes: list[Any], budget: Budget, numbers: list[float] = NUMBERS) -> Tensor:
    """Run a graph on one datum, backward included."""
    logprobs = torch.tensor(numbers, requires_grad=True)
    datum = Datum(ModelInput.from_ints([1] * len(numbers)), {})
    loss, _ = LossGraph.of(loss_body(*nodes)).evaluate([datum], [logprobs], budget)
    return torch.autograd.grad(loss, [logprobs])[0]


def budget_of(numbers: list[float] = NUMBERS) -> Budget:
    return Budget.of([torch.tensor(numbers)])


@pytest.fixture(scope="module")
def warm() -> None:
    """What torch imports when it is first counted is not the graph's."""
    with Meter():
        run([call("torch.exp", REF)], budget_of())


@pytest.mark.parametrize("case", PLANTED)
def test_a_small_graph_takes_little(case: str, warm: None, capsys: Any) -> None:
    """Each is refused as the sender's mistake, before it has taken memory or time; what Python itself takes counts too."""
    budget, meter = budget_of(), Meter()
    tracemalloc.start()
    began = time.perf_counter()
    try:
        with meter, pytest.raises((ConfigError, TooLargeError)):
            run(PLANTED[case], budget)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert meter.bytes < 25_000_000
    assert peak < 10_000_000
    assert meter.moved < 50_000_000
    assert meter.products < 100_000_000
    assert budget.operations < 400_000_000  # nanoseconds, as counted
    if SOAK:
        with capsys.disabled():
            print(
                f"\n{case}: {meter.bytes:,} bytes, {budget.operations:,} operations, {time.perf_counter() - began:.3f} s"
            )


@pytest.mark.parametrize("case", ["sixty results of a million", "three hundred products", "differences of differences"])
def test_without_a_budget_they_take_much(case: str) -> None:
    """Negative control: it is the budget that refuses them."""
    small = {"three hundred products": 8, "differences of differences": 2, "sixty results of a million": 32}[case]
    nodes = PLANTED[case][:small] if len(PLANTED[case]) > small else [call("torch.diff", REF, 90)]
    budget = Budget(10**15, 10**15)
    run(nodes, budget)
    assert budget.operations > PER_NODE * len(nodes)
    with pytest.raises(ConfigError, match="this server grants it"):
        run(nodes, Budget(budget.operations - 1, 10**15))
    with pytest.raises(ConfigError, match="this server grants it"):
        run(nodes, Budget(10**15, budget.bytes - 1))
    run(nodes, Budget(budget.operations, budget.bytes))


def test_all_datums_share_one_budget() -> None:
    """What one datum may do, ten thousand that hold nothing may not do ten thousand times; the refusal comes at once."""
    graph = LossGraph.of(loss_body(*[call("torch.exp", REF)] * 500))
    one, none = Datum(ModelInput.from_ints([1]), {}), torch.zeros(0, requires_grad=True)
    meter = Meter()
    with meter, pytest.raises(TooLargeError, match="element operations over all datums"):
        graph([one] * 10_000, [none] * 10_000)
    assert meter.calls == 0


def test_a_budget_grows_with_what_was_sent() -> None:
    """A refusal takes nothing; a call of more tokens is granted more."""
    budget = Budget(PER_NODE + 10, 80)
    for cost, word in ((Cost(11, 0), "hold 88 bytes"), (Cost(0, 11), "element operations")):
        with pytest.raises(TooLargeError, match=word):
            budget.spend(cost)
    assert (budget.operations, budget.bytes) == (0, 0)
    budget.spend(Cost(10, 10))
    nodes = [call("torch.exp", REF) for _ in range(200)]
    sizes = (1_000, 100_000)
    used = []
    for size in sizes:
        budget = budget_of([-0.5] * size)
        run(nodes, budget, [-0.5] * size)
        used.append(budget.bytes)
    assert used[1] > used[0] * 50
    with pytest.raises(ConfigError, match="grants"):
        run(nodes, budget_of([-0.5] * 1_000), [-0.5] * 100_000)


LIMITED = """
import resource, sys
import torch
from clients.planted_graphs import PLANTED
from test_custom_budget import budget_of, run
torch.set_num_threads(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for nodes in PLANTED.values():
    try:
        run(nodes, budget_of())
    except Exception as error:
        assert "MemoryError" not in repr(error) and "allocate" not in str(error), error
    else:
        raise SystemExit("was not refused")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
def test_the_process_grows_by_less_than_a_hundred_megabytes() -> None:
    """All of them one after another in a process of their own: the whole process, by the kernel's account."""
    path = [*sys.path, str(__import__("pathlib").Path(__file__).parent)]
    code = f"import sys; sys.path[:0] = {path!r}\n{LIMITED}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < MOST_BYTES
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss > 50_000  # kB: there was a process to measure
