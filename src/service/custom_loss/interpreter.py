"""Custom losses that arrive as data: a traced graph, run by an interpreter that knows a list of operations.

Nothing that was sent is executed. Every operation is looked up in the tables below; sizes are bounded before each runs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self, final

import torch
from torch import Tensor

from ...errors import ConfigError, LossTypeError, MissingFieldError
from .allowlist import ATTRIBUTES, FUNCTIONS, METHODS

__all__ = ["MISTAKES", "LossGraph"]

# What an operation raises when it is given the wrong thing; in a graph that was sent, all of it is the sender's mistake.
MISTAKES: Final = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError)

_METRIC: Final = re.compile(r"custom/[a-z0-9_./-]{1,64}:(sum|mean)")
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_GETATTR: Final = ("getattr", "builtins.getattr")
_MAX_NODES: Final = 2000
_MAX_LIST: Final = 64
_MAX_NUMBERS: Final = 1 << 24  # of one result
_MAX_DEPTH: Final = 8


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
            raise ConfigError(f"the graph has {len(graph['nodes'])} nodes; this server takes {_MAX_NODES}")
        graph_loss = cls(str(body.get("name", "custom")), inputs, graph["nodes"])
        for node in graph_loss.nodes:
            _check(node)
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
        losses: list[Tensor] = []
        sums: dict[str, float] = {}
        for i, (datum, own) in enumerate(zip(data, logprobs, strict=True)):
            loss, metrics = self._run(self._inputs_of(datum, own, i))
            losses.append(loss)
            for key, value in metrics.items():
                sums[key] = sums.get(key, 0.0) + float(value)
        counts = {key: len(data) if key.endswith(":mean") else 1 for key in sums}
        return torch.stack(losses).sum(), {key: value / counts[key] for key, value in sums.items()}

    def _inputs_of(self, datum: Any, logprobs: Tensor, index: int) -> list[Tensor]:
        inputs = [logprobs]
        for name, rank in self.inputs[1:]:
            if name not in datum.loss_fn_inputs:
                raise MissingFieldError(f"datum {index}: missing required field {name!r}, which {self.name} reads")
            inputs.append(datum.loss_fn_inputs[name].to_torch())
            if inputs[-1].dim() != rank:
                raise ConfigError(f"datum {index}: {name} has rank {inputs[-1].dim()}, {self.name} declared {rank}")
        return inputs

    def _run(self, inputs: Sequence[Tensor]) -> tuple[Tensor, Mapping[str, Tensor]]:
        values: dict[str, Any] = {}
        given = iter(inputs)
        for node in self.nodes:
            if node["op"] == "placeholder":
                values[node["name"]] = next(given)
                continue
            args = [_decoded(arg, values) for arg in node.get("args", ())]
            if node["op"] == "output":
                return _checked_output(args[0], self.name)
            kwargs = {key: _decoded(arg, values) for key, arg in (node.get("kwargs") or {}).items()}
            try:
                values[node["name"]] = _apply(node["op"], node["target"], args, kwargs)
            except MISTAKES as error:
                raise ConfigError(f"{self.name}: node {node['name']} ({node['target']}) failed: {error}") from error
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


def _apply(op: str, target: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
    if target in _GETATTR:
        if len(args) != 2 or not isinstance(args[0], Tensor) or args[1] not in ATTRIBUTES:
            raise ConfigError(f"custom losses can read {', '.join(ATTRIBUTES)} of a tensor, and nothing else")
        return getattr(args[0], args[1])
    _bound(target, [*args, *kwargs.values()])
    if op == "call_function":
        result = FUNCTIONS[target](*args, **kwargs)
    elif args and isinstance(args[0], Tensor):
        result = getattr(args[0], target)(*args[1:], **kwargs)
    else:
        raise ConfigError(f"the method {target!r} must be called on a tensor")
    for tensor in result if isinstance(result, (tuple, list)) else (result,):
        if isinstance(tensor, Tensor) and tensor.numel() > _MAX_NUMBERS:
            raise ConfigError(f"{target} makes {tensor.numel()} numbers; this server takes {_MAX_NUMBERS}")
    return result


def _bound(target: str, args: Sequence[Any]) -> None:
    """Refuse what would be too large or too slow, before it runs."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    numbers = [a for a in args if isinstance(a, (int, float)) and not isinstance(a, bool)]
    if not tensors and any(abs(a) > 2.0**53 for a in numbers if math.isfinite(a)):
        raise ConfigError(f"{target} on plain numbers over 2**53")
    if target in ("operator.pow", "math.pow") and not tensors and any(abs(a) > 64 for a in numbers[1:]):
        raise ConfigError(f"{target} on plain numbers with an exponent over 64")
    if len(tensors) > 1 and target not in ("operator.getitem", "torch.cat", "torch.stack", "torch.gather", "gather"):
        sizes = math.prod(max(t.shape[-1 - k] if k < t.dim() else 1 for t in tensors) for k in range(_MAX_DEPTH))
        if sizes > _MAX_NUMBERS:
            raise ConfigError(f"{target} would make {sizes} numbers; this server takes {_MAX_NUMBERS}")


def _decoded(arg: Any, values: Mapping[str, Any], depth: int = 0) -> Any:
    if depth > _MAX_DEPTH:
        raise ConfigError("an argument of the graph is nested too deeply")
    if isinstance(arg, list):
        if len(arg) > _MAX_LIST:
            raise ConfigError(f"an argument of the graph is a list of {len(arg)}; this server takes {_MAX_LIST}")
        return [_decoded(a, values, depth + 1) for a in arg]
    if not isinstance(arg, dict):
        return arg
    if len(arg) != 1:
        raise ConfigError("an encoded argument must have one key")
    ((kind, value),) = arg.items()
    return _decoded_object(kind, value, values, depth + 1)


def _decoded_object(kind: str, value: Any, values: Mapping[str, Any], depth: int) -> Any:
    if kind == "ref":
        if value not in values:
            raise ConfigError(f"the graph refers to {value!r}, which no earlier node has made")
        return values[value]
    if kind == "tuple":
        return tuple(_decoded(value, values, depth))
    if kind == "dict":
        return {str(key): _decoded(item, values, depth) for key, item in value.items()}
    if kind == "slice":
        return slice(*_decoded(value, values, depth))
    if kind == "ellipsis":
        return ...
    if kind == "float" and value in ("inf", "-inf", "nan"):
        return float(value)
    if kind == "dtype" and isinstance(getattr(torch, str(value), None), torch.dtype):
        return getattr(torch, value)
    if kind == "device" and value == "cpu":
        return torch.device("cpu")
    raise ConfigError(f"the graph has an argument of kind {kind!r} ({value!r}), which this server does not read")


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
