"""Custom losses that arrive as data: a traced graph, run by an interpreter that knows a list of operations.

Nothing that was sent is executed. Every operation is looked up in a table; what it costs is taken from a budget before it runs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self, final

import torch
from torch import Tensor

from ...errors import ConfigError, LossTypeError, MissingFieldError
from .allowlist import ATTRIBUTES, FIELDS, FUNCTIONS, METHODS
from .arguments import check_arguments, count_values, decode_argument, is_value
from .budget import PER_NODE, Budget, Cost
from .costs import cost_of
from .gradients import MISTAKES, differentiated

__all__ = ["LossGraph"]

_METRIC: Final = re.compile(r"custom/[a-z0-9_./-]{1,64}:(sum|mean)")
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_GETATTR: Final = ("getattr", "builtins.getattr")
_MAX_NODES: Final = 2000
_MAX_VALUES: Final = 32_000  # of all arguments together
_PER_VALUE: Final = 500  # element operations that reading one takes


@final
@dataclass(frozen=True)
class LossGraph:
    """A loss of one datum as data: called like a user's function, on all datums; losses add up.

    Args:
        name: of the loss.
        inputs: names and ranks, log-probs first.
        nodes: operations in order, as the protocol writes them.
    """

    name: str
    inputs: Sequence[tuple[str, int]]
    nodes: Sequence[Mapping[str, Any]]

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> Self:
        """Read a ``create_custom_loss`` request; everything is looked up before anything runs.

        Raises:
            ConfigError: an operation that is not allowed, or a malformed graph.
        """
        graph, inputs = body["graph"], [(str(entry["name"]), int(entry["rank"])) for entry in body["inputs"]]
        if graph.get("format") != 1:
            raise ConfigError(f"the graph has format {graph.get('format')!r}; this server reads 1")
        if not inputs or inputs[0][0] != "logprobs":
            raise ConfigError("the first input of a custom loss must be logprobs")
        if len(graph["nodes"]) > _MAX_NODES:
            raise ConfigError(f"the graph has {len(graph['nodes'])} nodes; this server takes at most {_MAX_NODES}")
        graph_loss = cls(str(body.get("name", "custom")), inputs, graph["nodes"])
        for node in graph_loss.nodes:
            _check(node)
        if graph_loss._values > _MAX_VALUES:
            raise ConfigError(
                f"the graph's arguments have {graph_loss._values} values; this server takes at most {_MAX_VALUES}"
            )
        if [node["target"] for node in graph_loss.nodes if node["op"] == "placeholder"] != [name for name, _ in inputs]:
            raise ConfigError("the graph's placeholders must be the inputs, in their order")
        if not graph_loss.nodes or graph_loss.nodes[-1]["op"] != "output":
            raise ConfigError("the graph's last node must be its output")
        return graph_loss

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(self, data: Sequence[Any], logprobs: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Run the graph on every datum; the losses add up, metrics by their suffix."""
        return self.evaluate(data, logprobs, Budget.of(logprobs))

    def evaluate(
        self, data: Sequence[Any], logprobs: Sequence[Tensor], budget: Budget
    ) -> tuple[Tensor, dict[str, float]]:
        """Run the graph on every datum, forward and backward, within a budget.

        Raises:
            TooLargeError: the operations of all datums alone are more than the budget has.
            ConfigError: an operation failed, in either direction, or would be more than what is left.
        """
        calls = sum(node["op"] not in ("placeholder", "output") for node in self.nodes)
        budget.spend(Cost(0, _PER_VALUE * self._values * len(data)))
        budget.check(budget.operations + PER_NODE * calls * len(data))
        losses: list[Tensor] = []
        sums: dict[str, float] = {}
        for i, (datum, own) in enumerate(zip(data, logprobs, strict=True)):
            loss, metrics = self._run(self._inputs_of(datum, own, i), budget)
            losses.append(loss)
            for key, value in metrics.items():
                sums[key] = sums.get(key, 0.0) + float(value)
        counts = {key: len(data) if key.endswith(":mean") else 1 for key in sums}
        total = differentiated(self.name, torch.stack(losses).sum(), logprobs)
        return total, {key: value / counts[key] for key, value in sums.items()}

    @property
    def _values(self) -> int:
        """Values that the arguments of all nodes are made of."""
        return sum(count_values([node.get("args", ()), node.get("kwargs")]) for node in self.nodes)

    def _inputs_of(self, datum: Any, logprobs: Tensor, index: int) -> list[Tensor]:
        inputs = [logprobs]
        for name, rank in self.inputs[1:]:
            if name not in datum.loss_fn_inputs:
                raise MissingFieldError(f"datum {index}: missing required field {name!r}, which {self.name} reads")
            inputs.append(datum.loss_fn_inputs[name].to_torch())
            if inputs[-1].dim() != rank:
                raise ConfigError(f"datum {index}: {name} has rank {inputs[-1].dim()}, {self.name} declared {rank}")
        return inputs

    def _run(self, inputs: Sequence[Tensor], budget: Budget) -> tuple[Tensor, Mapping[str, Tensor]]:
        values: dict[str, Any] = {}
        given = iter(inputs)
        for node in self.nodes:
            if node["op"] == "placeholder":
                values[node["name"]] = next(given)
                continue
            try:
                args = [decode_argument(arg, values) for arg in node.get("args", ())]
                kwargs = {key: decode_argument(arg, values) for key, arg in (node.get("kwargs") or {}).items()}
                if node["op"] != "output":
                    values[node["name"]] = _apply(node["op"], node["target"], args, kwargs, budget)
            except MISTAKES as error:
                raise ConfigError(f"{self.name}: node {node['name']} ({node['target']}) failed: {error}") from error
            if node["op"] == "output":
                return _checked_output(args[0] if args else None, self.name)
        raise ConfigError(f"{self.name} has no output")


def _check(node: Any) -> None:
    op, target = node["op"], node["target"]
    if not isinstance(node["name"], str) or not _NAME.fullmatch(node["name"]):
        raise ConfigError(f"a node of the graph has the name {node['name']!r}")
    if op == "call_function" and target not in FUNCTIONS and target not in _GETATTR:
        raise ConfigError(f"custom losses cannot call {target!r} on this server")
    if op == "call_method" and target not in METHODS:
        raise ConfigError(f"custom losses cannot call the method {target!r} on this server")
    if op not in ("placeholder", "call_function", "call_method", "output"):
        raise ConfigError(f"custom losses cannot have a node of kind {op!r} on this server")


def _apply(op: str, target: str, args: list[Any], kwargs: dict[str, Any], budget: Budget) -> Any:
    if target in _GETATTR and len(args) == 2 and isinstance(args[0], tuple) and args[1] in FIELDS:
        return getattr(args[0], args[1])
    if target in _GETATTR:
        if len(args) != 2 or not isinstance(args[0], Tensor) or args[1] not in ATTRIBUTES:
            raise ConfigError(f"custom losses can read {', '.join(ATTRIBUTES)} of a tensor, and nothing else")
        budget.spend(cost_of(args[1], args[:1], {}))
        return getattr(args[0], args[1])
    if op == "call_method" and not (args and isinstance(args[0], Tensor)):
        raise ConfigError(f"the method {target!r} must be called on a tensor")
    if target == "view" and any(isinstance(arg, torch.dtype) for arg in (*args, *kwargs.values())):
        raise ConfigError("view takes a shape; use to(dtype) for another dtype")
    check_arguments(target, args, kwargs)
    budget.spend(cost_of(target.rpartition(".")[2], args, kwargs))
    function = FUNCTIONS[target] if op == "call_function" else getattr(torch.Tensor, target)
    result = function(*args, **kwargs)
    if not is_value(result):
        raise ConfigError(f"{target} returned a {type(result).__name__}; a graph holds numbers, tensors and shapes")
    return result


def _checked_output(output: Any, name: str) -> tuple[Tensor, Mapping[str, Tensor]]:
    loss, metrics = output if isinstance(output, (tuple, list)) and len(output) == 2 else (output, None)
    if not isinstance(loss, Tensor) or loss.dim() != 0 or not isinstance(metrics, dict):
        raise LossTypeError(f"{name} must return (scalar loss, metrics), got {type(loss).__name__} and {metrics!r}")
    for key, value in metrics.items():
        if not _METRIC.fullmatch(key):
            raise ConfigError(f"{name} has a metric {key!r}; it must be custom/<name>:sum or custom/<name>:mean")
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise LossTypeError(f"{name} has a metric {key!r} that is no single number")
    return loss, metrics
