"""Custom losses as they are sent, and what running one really takes, counted below torch's own functions."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

REF = {"ref": "logprobs"}


def loss_body(*nodes: tuple[Any, ...]) -> dict[str, Any]:
    """Return a loss of log-probs alone; node i is called ``n<i>``, and the sum of the last one is the loss."""
    encoded: list[Any] = [{"op": "placeholder", "name": "logprobs", "target": "logprobs", "args": []}]
    ended = (*nodes, ("call_method", "sum", [{"ref": f"n{len(nodes) - 1}"}]))
    for i, (op, target, args, *kwargs) in enumerate(ended):
        encoded.append(
            {"op": op, "name": f"n{i}", "target": target, "args": args, "kwargs": kwargs[0] if kwargs else {}}
        )
    returned = {"tuple": [{"ref": f"n{len(nodes)}"}, {"dict": {}}]}
    encoded.append({"op": "output", "name": "output", "target": "output", "args": [returned]})
    return {"name": "sent", "inputs": [{"name": "logprobs", "rank": 1}], "graph": {"format": 1, "nodes": encoded}}


def call(target: str, *args: Any, **kwargs: Any) -> tuple[str, str, list[Any], dict[str, Any]]:
    """Return a node that calls a function."""
    return "call_function", target, list(args), kwargs


def node(i: int) -> dict[str, str]:
    """Return a reference to a node."""
    return {"ref": f"n{i}"}


class Meter(TorchDispatchMode):
    """Counts the bytes of all new tensors and the numbers that are read and written, backward passes included."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.moved = self.calls = self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        known = {tensor.untyped_storage().data_ptr() for tensor in given}
        new = [tensor for tensor in made if tensor.untyped_storage().data_ptr() not in known]
        self.calls += 1
        self.bytes += sum(tensor.untyped_storage().nbytes() for tensor in new)
        self.moved += sum(tensor.numel() for tensor in [*given, *new])
        if func.__name__.split(".")[0] in ("mm", "bmm", "mv"):
            self.products += given[0].numel() * given[1].shape[-1]
        return result
