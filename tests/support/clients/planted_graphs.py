"""Small graphs of custom losses that would take much memory or time, or that are no arithmetic of tensors at all."""

from __future__ import annotations

from typing import Any

from clients.graphs import REF, call, node

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
