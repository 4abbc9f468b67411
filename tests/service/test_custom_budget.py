"""What a custom loss may take: bytes and operations are counted before anything runs, whatever the graph is."""

from __future__ import annotations

import contextlib
import resource
import subprocess
import sys
import time
import tracemalloc
import warnings
from typing import Any

import pytest
import torch
from graphs import REF, Meter, call, loss_body, node
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import SOAK, TIER
from torch import Tensor

from pullback.datums import Datum, ModelInput
from pullback.errors import ConfigError, TooLargeError
from pullback.service.custom_loss.allowlist import FUNCTIONS, METHODS
from pullback.service.custom_loss.arguments import check_arguments, is_value
from pullback.service.custom_loss.budget import PER_NODE, Budget, Cost
from pullback.service.custom_loss.costs import cost_of
from pullback.service.custom_loss.interpreter import LossGraph

MOST_BYTES = 100_000_000  # that a small request may take, all of its tensors together
EXAMPLES = 100_000 if SOAK else 400 if TIER == "all" else 60
NUMBERS = [0.5] * 100
VIEW = ("call_method", "reshape", [REF, -1, 1])
SQUARE = [VIEW, call("operator.mul", node(0), REF), call("torch.cat", [node(1)] * 16)]  # 1,600 x 100
LONG = [call("torch.cat", [REF] * 64), call("torch.cat", [node(0)] * 64)]  # 409,600
EMPTY = [call("operator.getitem", REF, {"slice": [0, 0, None]}), ("call_method", "reshape", [node(0), 0, 2**31])]
WIDE = [call("torch.cat", [REF] * 40), ("call_method", "reshape", [node(0), -1, 1])]

PLANTED: dict[str, list[Any]] = {
    "a string that is multiplied": [call("operator.mul", "a" * 1000, 2**21)],
    "a sequence that is multiplied": [call("operator.mul", {"tuple": [1]}, 2**28)],
    "a shape that is multiplied": [
        call("builtins.getattr", REF, "shape"),
        *[call("operator.mul", node(i), 60) for i in range(5)],
    ],
    "a format": [call("operator.mod", "%01999999999d", 5)],
    "sequences that are added": [call("operator.add", [1] * 64, [1] * 64)],
    "sixty results of a million": [*LONG, *[call("operator.mul", node(1), 1.5) for _ in range(60)]],
    "copies of copies": [call("torch.cat", [REF if i == 0 else node(i - 1)] * 48) for i in range(8)],
    "stacks of stacks": [call("torch.stack", [REF if i == 0 else node(i - 1)] * 48) for i in range(6)],
    "an outer product": [*WIDE, call("operator.mul", node(0), node(1)), call("operator.mul", node(2), node(2))],
    "an index tensor": [
        *WIDE,
        call("torch.zeros_like", node(1), dtype={"dtype": "int64"}),
        ("call_method", "flatten", [node(2)]),
        call("operator.getitem", node(1), {"tuple": [node(2)]}),
        call("torch.stack", [node(2)] * 64),
        call("operator.getitem", node(0), node(5)),
        call("operator.getitem", node(6), node(5)),
    ],
    "index_select": [
        *WIDE,
        call("torch.zeros_like", node(0), dtype={"dtype": "int64"}),
        ("call_method", "reshape", [node(0), 1, -1]),
        call("torch.index_select", node(3), 0, node(2)),
    ],
    "differences of differences": [call("torch.diff", REF, 900_000)],
    "differences by name": [call("torch.diff", REF, n=900_000)],
    "three hundred products": [
        *SQUARE,
        ("call_method", "t", [node(2)]),
        *[call("operator.matmul", node(2), node(3)) for _ in range(300)],
    ],
    "products of an empty dimension": [
        *EMPTY[:1],
        ("call_method", "reshape", [node(0), 0, 20_000]),
        ("call_method", "t", [node(1)]),
        call("operator.matmul", node(2), node(1)),
    ],
    "a sum over an empty dimension": [*EMPTY, call("torch.sum", node(1), 0)],
    "the pieces of a long tensor": [*LONG, call("torch.unbind", node(1))],
    "a roll in many steps": [*LONG, *[call("torch.roll", node(1), [1] * 64, [0] * 64) for _ in range(20)]],
    "the places of what is true": [*LONG, *[call("torch.where", node(1)) for _ in range(20)]],
    "bytes as numbers": [*LONG, ("call_method", "view", [node(1), {"dtype": "uint8"}])],
    "sorting": [*LONG, *[call("torch.sort", node(1)) for _ in range(100)]],
    "the k largest": [*LONG, *[call("torch.topk", node(1), 400_000) for _ in range(20)]],
    "slow functions": [*LONG, *[call("torch.logcumsumexp", node(1), 0) for _ in range(60)]],
    "small parts of a large tensor": [*LONG, *[call("operator.getitem", node(1), i) for i in range(1500)]],
    "an output that is given": [call("torch.exp", REF, out=REF)],
    "a change in place": [call("torch.nn.functional.relu", REF, inplace=True)],
    "a norm by singular values": [*SQUARE, call("torch.norm", node(2), p="nuc")],
    "a tower of powers": [call("operator.pow", 10, 10**6)],
    "a power that is complex": [call("operator.pow", -2, 0.5)],
    "a complex dtype": [("call_method", "to", [REF, {"dtype": "complex128"}])],
    "a list of a list": [call("operator.getitem", [[1, 2], "x"], 1)],
}


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


dtypes = st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool])
sizes = st.lists(st.sampled_from([0, 1, 1, 2, 3, 7]), max_size=3)
whole = st.sampled_from([-2, -1, 0, 1, 2, 3, 40])


@st.composite
def tensors(draw: st.DrawFn, shape: Any = sizes, kinds: Any = dtypes) -> Tensor:
    """Draw a tensor; one of numbers with a fraction is differentiable."""
    dtype, of = draw(kinds), draw(shape)
    if dtype.is_floating_point:
        return torch.rand(of, dtype=dtype).requires_grad_()
    return torch.ones(of, dtype=dtype) if dtype == torch.bool else torch.zeros(of, dtype=dtype)


items = (
    st.sampled_from([0, -1, None, ..., True, slice(None), slice(1, None), slice(None, None, 2), [0, 0, 0], [0]])
    | tensors(kinds=st.just(torch.int64))
    | tensors(kinds=st.just(torch.bool))
)
plain = tensors() | whole | st.floats(0, 1) | st.sampled_from([None, True]) | st.lists(whole, max_size=3)


@st.composite
def arguments(draw: st.DrawFn, name: str) -> list[Any]:
    """Draw arguments that the operation may be able to take."""
    first = draw(tensors())
    if name == "getitem":
        return [first, draw(items | st.lists(items, max_size=3).map(tuple))]
    if name in ("cat", "concat", "stack"):
        return [[first] * draw(st.integers(1, 9)), draw(whole)] if draw(st.booleans()) else [[first] * 3]
    if name in ("gather", "index_select", "take_along_dim"):
        index = draw(tensors(kinds=st.just(torch.int64)))
        return [first, index, draw(whole)] if name == "take_along_dim" else [first, draw(whole), index]
    if draw(st.booleans()):
        return [first, draw(tensors(shape=st.just(list(first.shape))))]
    if draw(st.integers(0, 3)) == 0:
        matrix = draw(tensors(shape=st.just([*first.shape[:-2], *reversed(first.shape[-2:])])))
        return [first, matrix]
    return [first, *draw(st.lists(plain, max_size=3))]


OPERATIONS = sorted(
    [(name, function) for name, function in FUNCTIONS.items() if not name.startswith("math.")]
    + [(name, getattr(Tensor, name)) for name in METHODS if hasattr(Tensor, name)],
    key=lambda pair: pair[0],
)


@given(data=st.data())
@settings(max_examples=EXAMPLES)
def test_no_result_is_larger_than_was_counted(data: st.DataObject) -> None:
    """Every operation with any arguments: its results and, but for a factor, all that torch makes inside and backward."""
    target, function = data.draw(st.sampled_from(OPERATIONS))
    name = target.rpartition(".")[2]
    args = data.draw(arguments(name))
    try:
        check_arguments(target, args, {})
    except ConfigError:
        return
    cost, meter = cost_of(name, args, {}), Meter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with meter:
                result = function(*args)
        except (
            RuntimeError,
            TypeError,
            ValueError,
            IndexError,
            NotImplementedError,
            AttributeError,
            ZeroDivisionError,
        ):
            return
    if not is_value(result):
        return
    made = [r for r in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(r, Tensor)]
    assert sum(tensor.numel() for tensor in made) <= cost.numbers, (target, args)
    assert all(tensor.element_size() <= 8 for tensor in made)
    given_bytes = 8 * sum(arg.numel() for arg in args if isinstance(arg, Tensor))
    assert meter.bytes <= 3 * 8 * cost.numbers + 256, (target, args)
    whole_meter = Meter()
    with whole_meter:
        slopes = [tensor.sum() for tensor in made if tensor.requires_grad]
        if slopes:
            with contextlib.suppress(RuntimeError):  # dtypes that only the forward pass of a function takes
                torch.stack([slope.double() for slope in slopes]).sum().backward()
    assert whole_meter.bytes <= 8 * (8 * cost.numbers + given_bytes) + 1024 * (1 + len(made)), (target, args)


def test_an_operation_that_is_not_counted_is_noticed() -> None:
    """Negative control of the property: its meter sees what an operation outside the list makes."""
    meter = Meter()
    with meter:
        torch.ones(3).repeat(1000)
    assert meter.bytes >= 12_000
    assert cost_of("exp", [torch.ones(3)], {}).numbers == 3


LIMITED = """
import resource, sys
import torch
from test_custom_budget import PLANTED, budget_of, run
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
