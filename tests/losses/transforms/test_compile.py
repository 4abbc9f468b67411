"""Losses under torch.compile: one whole graph, eager's numbers, few graphs for many shapes, one kernel each way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from example_losses.loss_inputs import DEFAULTS, EXTRA, VARIANTS, Inputs, ids, make
from torch import Tensor

from pullback.losses import GRPO, PPO, CrossEntropy, Loss, TokenBatch

# torch's own: where it traces a torch.autograd.Function, and where its compiler is imported.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
]

Tensors = dict[str, Tensor]
Evaluation = Callable[[Tensors, Tensor], Tensor]
LOSSES = [*DEFAULTS, *EXTRA]
SHAPES = [(5, 3, 4, 6), (7, 3, 4, 6), (2, 3, 8, 2, 3, 4), (9, 5, 2, 2, 3, 4), (4, 4, 5, 8), (11, 2, 3, 4)]
SEQUENCE_INPUTS = ("pair_id", "role", "group_id", "label")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def evaluation(loss: Loss, padded: bool, *, inside: bool = False) -> Evaluation:
    """Return a function of tensors; the loss is made inside of it, or outside."""
    kind, fields = type(loss), {f.name: getattr(loss, f.name) for f in dataclasses.fields(loss)}  # type: ignore[arg-type]

    def evaluate(tensors: Tensors, lengths: Tensor) -> Tensor:
        used = kind(**fields) if inside else loss
        rest = dict(tensors)
        x = rest.pop("logprobs")
        if padded:
            return used.evaluate(TokenBatch.from_padded(x, rest.pop("weights"), **rest)).loss
        return used.evaluate(TokenBatch.from_packed(x, lengths, **rest)).loss

    return evaluate


def result(evaluate: Evaluation, inputs: Inputs) -> tuple[Tensor, Tensor]:
    leaf = inputs.tensors["logprobs"].clone().requires_grad_()
    value = evaluate({**inputs.tensors, "logprobs": leaf}, inputs.lengths)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def agrees(loss: Loss, inputs: Inputs, backend: Any, *, inside: bool) -> None:
    """Assert that the compiled loss, one whole graph, has the eager value and gradient."""
    evaluate = evaluation(loss, inputs.padded, inside=inside)
    compiled = result(torch.compile(evaluate, fullgraph=True, backend=backend), inputs)
    for have, want in zip(compiled, result(evaluate, inputs), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-6, atol=1e-7)


QUICK = (("grpo", True), ("dpo", False))  # the others take a minute


@pytest.mark.parametrize(
    ("loss", "padded"),
    [
        pytest.param(x, padded, marks=() if (x.name, padded) in QUICK else pytest.mark.slow)
        for x in DEFAULTS
        for padded in (True, False)
    ],
)
def test_whole_graph(loss: Loss, padded: bool) -> None:
    """Every registered loss is one graph with the eager results, made inside the graph or outside."""
    agrees(loss, make(loss, padded=padded, pair_ids=True, old=True), "eager", inside=padded)


@pytest.mark.parametrize("loss", VARIANTS, ids=ids(VARIANTS))
@pytest.mark.parametrize(
    ("padded", "inside"),
    [
        pytest.param(True, True, marks=pytest.mark.slow, id="padded-inside"),
        pytest.param(False, False, marks=pytest.mark.slow, id="packed-outside"),
        pytest.param(True, False, marks=pytest.mark.soak, id="padded-outside"),
        pytest.param(False, True, marks=pytest.mark.soak, id="packed-inside"),
    ],
)
def test_whole_graph_everywhere(loss: Loss, padded: bool, inside: bool) -> None:
    """So is every aggregation and option, with bool masks too, through the autograd of the compiler."""
    agrees(loss, make(loss, padded=padded, mask="bool" if inside else "float"), "aot_eager", inside=inside)


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES, ids=ids(LOSSES))
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "packed"])
def test_inductor(loss: Loss, padded: bool) -> None:
    """The compiler's own code has the eager results."""
    agrees(loss, make(loss, padded=padded, pair_ids=padded), "inductor", inside=padded)


class Graphs:
    """A compiler that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, examples: Any) -> Any:
        self.count += 1
        return graph.forward


def mark_dynamic(inputs: Inputs) -> None:
    """Say that the numbers of sequences and of tokens vary."""
    for name, tensor in (*inputs.tensors.items(), ("lengths", inputs.lengths)):
        torch._dynamo.mark_dynamic(tensor, 0)
        if inputs.padded and name not in (*SEQUENCE_INPUTS, "lengths"):
            torch._dynamo.mark_dynamic(tensor, 1)


def graphs_of(loss: Loss, padded: bool, mark: bool) -> int:
    """Return how many graphs six shapes take."""
    graphs = Graphs()
    compiled = torch.compile(evaluation(loss, padded), fullgraph=True, backend=graphs)
    for lengths in SHAPES:
        inputs = make(loss, padded=padded, lengths=lengths)
        if mark:
            mark_dynamic(inputs)
        compiled(inputs.tensors, inputs.lengths)
    return graphs.count


@pytest.mark.parametrize(
    ("loss", "padded"),
    [
        pytest.param(x, padded, marks=() if (x.name, padded) == QUICK[0] else pytest.mark.slow)
        for x in DEFAULTS
        for padded in (True, False)
    ],
)
def test_shapes_share_graphs(loss: Loss, padded: bool) -> None:
    """Six shapes take at most three graphs; one where the sizes are said to vary. (torch takes sizes of 1 apart.)"""
    assert graphs_of(loss, padded, mark=False) <= 3
    torch._dynamo.reset()
    assert graphs_of(loss, padded, mark=True) == 1


@pytest.mark.parametrize("loss", [CrossEntropy("token_mean"), GRPO()], ids=lambda x: x.name)
def test_tensor_counts_do_not_recompile(loss: Loss) -> None:
    """The totals of a step, as tensors, are values of the graph: another step is no other graph."""
    graphs = Graphs()

    def evaluate(x: Tensor, tensors: Tensors, total: Tensor) -> Tensor:
        return loss.evaluate(TokenBatch.from_padded(x, **tensors), {"tokens": total}).loss

    compiled = torch.compile(evaluate, fullgraph=True, backend=graphs)
    inputs = make(loss, padded=True)
    rest = dict(inputs.tensors)
    x = rest.pop("logprobs")
    for total in (100.0, 101.0, 12345.0):
        count = torch.tensor(total, dtype=torch.float64)
        torch.testing.assert_close(compiled(x, rest, count), evaluate(x, rest, count), rtol=1e-6, atol=1e-8)
    assert graphs.count == 1


KERNELS: list[Loss] = [CrossEntropy(), CrossEntropy("token_mean"), PPO(), GRPO()]


@pytest.mark.slow
@pytest.mark.parametrize("loss", KERNELS, ids=ids(KERNELS))
def test_one_kernel_each_way(loss: Loss) -> None:
    """A token loss is one kernel forward and one backward."""
    from torch._inductor.utils import run_and_get_code

    inputs = make(loss, padded=True, mask="ones", lengths=(64, 64, 64, 64))
    compiled = torch.compile(evaluation(loss, True), fullgraph=True)
    _, code = run_and_get_code(lambda: result(compiled, inputs))
    assert [part.count("async_compile.cpp_pybinding(") for part in code] == [1, 1]


def test_a_break_is_noticed() -> None:
    """Negative control: a function that reads a value is no whole graph."""

    def evaluate(tensors: Tensors, lengths: Tensor) -> Tensor:
        output = CrossEntropy().evaluate(TokenBatch.from_padded(tensors["logprobs"], tensors["weights"]))
        return output.loss if output.loss > 0 else output.loss * 2

    inputs = make(CrossEntropy(), padded=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(evaluate, fullgraph=True, backend="eager")(inputs.tensors, inputs.lengths)
