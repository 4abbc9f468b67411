"""A head in parts on several processes against the whole head on each: differences, refusals, bytes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers import AllocationTracker
from many_ranks.payload import Payload
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pullback.errors import PullbackError
from pullback.ops import Head, own_positions_logprobs, selected_logprobs, vocab_parallel_logprobs

VOCAB, WIDTH, COUNT = 23, 6, 40
PARTS = {2: [[9, 14], [23, 0]], 4: [[3, 0, 15, 5], [6, 6, 6, 5]]}


def inputs(k: int = 1, dtype: torch.dtype = torch.float64, scale: float = 1.0, seed: int = 0) -> dict[str, Any]:
    """The same on every rank: hidden states, the whole weight and bias, targets in every rank's part, a cotangent."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    targets = torch.stack([torch.randperm(VOCAB, generator=generator).repeat(2)[:COUNT] for _ in range(k)], -1)
    return {
        "hidden": (scale * normal(COUNT, WIDTH)).to(dtype),
        "weight": normal(VOCAB, WIDTH).to(dtype),
        "bias": normal(VOCAB).to(dtype),
        "targets": targets if k > 1 else targets[:, 0],
        "cotangent": normal(*(targets if k > 1 else targets[:, 0]).shape),
    }


def whole_and_part(given: dict[str, Any], parts: list[int], form: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probs and gradients of hidden, weight and bias by `selected_logprobs`, this rank's rows of them; and by ours."""
    rows = slice(sum(parts[: dist.get_rank()]), sum(parts[: dist.get_rank() + 1]))
    found: list[list[Tensor]] = []
    act: Callable[..., Tensor]
    for own, act in ((slice(0, VOCAB), selected_logprobs), (rows, vocab_parallel_logprobs)):
        hidden = given["hidden"].clone().requires_grad_()
        weight = given["weight"][own].clone().requires_grad_(form["trained"])
        bias = given["bias"][own].clone().requires_grad_(form["trained"]) if form["bias"] else None
        head = Head(weight, bias, form["softcap"], form["scale"])
        options = {"temperature": form["temperature"], "memory_budget": form["memory_budget"]}
        logprobs = act(hidden, head, given["targets"], **options)
        torch.autograd.backward(logprobs, given["cotangent"].to(logprobs.dtype))
        assert hidden.grad is not None
        gradients = [x.grad for x in (weight, bias) if x is not None and x.grad is not None]
        at = rows if not found else slice(None)
        found.append([logprobs.detach(), hidden.grad, *(g[at] for g in gradients)])
    return found[0], found[1]


def error(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest relative difference of any of these tensors, over all ranks; inf where one is not finite."""
    assert len(a) == len(b)
    each = [
        float((x.double() - y.double()).norm() / x.double().norm().clamp(min=1e-12)) for x, y in zip(a, b, strict=True)
    ]
    every = [torch.zeros(1, dtype=torch.float64) for _ in range(dist.get_world_size())]
    own = torch.tensor(each, dtype=torch.float64).nan_to_num(torch.inf, torch.inf).amax()[None]
    dist.all_gather(every, own)
    return max(map(float, every))


FORM: dict[str, Any] = {
    "trained": True,
    "bias": True,
    "softcap": 3.0,
    "scale": 0.5,
    "temperature": 0.7,
    "memory_budget": 700,
}
PLAIN = FORM | {"bias": False, "softcap": None, "scale": 1.0, "temperature": 1.0, "memory_budget": None}


def agreement(parts: list[int]) -> dict[str, float]:
    """Errors in fp64 by kind of head."""
    found = {}
    for k, trained, form, budget in product((1, 3), (False, True), (FORM, PLAIN), (50, None)):
        case = form | {"trained": trained, "memory_budget": budget}
        found[f"K={k} {case}"] = error(*whole_and_part(inputs(k), parts, case))
    far = inputs(scale=400.0)  # log-probs of thousands of nats
    found["far"] = error(*whole_and_part(far, parts, PLAIN))
    return found


def half(parts: list[int]) -> dict[str, list[float]]:
    """Errors of the whole head and of its parts in lower precision, both against fp64 on the same numbers."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        given = inputs(dtype=dtype, scale=3.0)
        exact = {key: x.double() if x.is_floating_point() else x for key, x in given.items()}
        reference = whole_and_part(exact, parts, PLAIN)[0]
        whole, part = whole_and_part(given, parts, PLAIN)
        found[str(dtype)] = [error(reference, whole), error(reference, part)]
    return found


def confident(parts: list[int]) -> float:
    """Error of a gradient in fp32 where 1 - p is 1e-7 and below: a subtraction would have lost it."""
    given = inputs()
    given["targets"] = (given["hidden"] @ given["weight"].T).argmax(-1)
    given["hidden"] = given["hidden"] * 12
    low = {key: x.float() if x.is_floating_point() else x for key, x in given.items()}
    exact = {key: x.double() if x.is_floating_point() else x for key, x in low.items()}
    reference, _ = whole_and_part(exact, parts, PLAIN | {"trained": False})
    _, part = whole_and_part(low, parts, PLAIN | {"trained": False})
    rows = reference[0].neg() < 1e-6
    assert int(rows.sum()) > 0
    differences = (part[1][rows].double() - reference[1][rows]).norm(dim=-1) / reference[1][rows].norm(dim=-1)
    return float(differences.max())


@contextmanager
def without(number: int) -> Iterator[None]:
    """Leave out one of the reductions of a call on every rank, in the order of the call."""
    reduce, count = dist.all_reduce, iter(range(100))

    def maybe(*args: Any, **kwargs: Any) -> Any:
        return None if next(count) == number else reduce(*args, **kwargs)

    dist.all_reduce = maybe
    try:
        yield
    finally:
        dist.all_reduce = reduce


def controls(parts: list[int]) -> list[float]:
    """Errors with each of the three reductions left out."""
    found = []
    for number in range(3):
        with without(number):
            found.append(whole_and_part(inputs(3), parts, FORM))
    return [error(*pair) for pair in found]


def refusals() -> dict[str, str]:
    """What is raised on this rank where rank 1, or every rank, is asked something wrong."""
    given, rank = inputs(), dist.get_rank()
    hidden, targets, head = given["hidden"], given["targets"], Head(given["weight"])
    one = rank == 1
    bad, none = torch.full_like(targets, VOCAB * dist.get_world_size()), targets[:, None][:, :0]
    calls: dict[str, Callable[[], Tensor]] = {
        "targets": lambda: vocab_parallel_logprobs(hidden, head, targets.roll(1) if one else targets),
        "temperature": lambda: vocab_parallel_logprobs(hidden, head, targets, temperature=2.0 if one else 1.0),
        "gradient": lambda: vocab_parallel_logprobs(hidden.clone().requires_grad_(one), head, targets),
        "count": lambda: vocab_parallel_logprobs(hidden[rank:], head, targets[rank:]),
        "dtype": lambda: vocab_parallel_logprobs(
            hidden, head._replace(weight=head.weight.float()) if one else head, targets
        ),
        "width": lambda: vocab_parallel_logprobs(hidden[:, 1:] if one else hidden, head, targets),
        "refused": lambda: vocab_parallel_logprobs(hidden, head, targets, temperature=-1.0 if one else 1.0),
        "no target": lambda: vocab_parallel_logprobs(hidden, head, none if one else targets),
        "integers": lambda: vocab_parallel_logprobs(hidden.long() if one else hidden, head, targets),
        "no target of its own": lambda: own_positions_logprobs(hidden, head, none if one else targets),
        "integers of its own": lambda: own_positions_logprobs(hidden.long() if one else hidden, head, targets),
        "bias": lambda: vocab_parallel_logprobs(hidden, head._replace(bias=given["bias"][1:]), targets),
        "outside": lambda: vocab_parallel_logprobs(hidden, head, bad),
        "negative": lambda: vocab_parallel_logprobs(hidden, head, targets - 1),
    }
    found = {}
    for name, call in calls.items():
        try:
            call()
            found[name] = "nothing"
        except PullbackError as raised:
            found[name] = f"{type(raised).__name__}: {raised}"
    return found


def costs(parts: list[int]) -> dict[str, float]:
    """Bytes received forward and backward, FLOPs, and the largest storage, of a frozen head with a small budget."""
    given, own = inputs(), parts[dist.get_rank()]
    hidden = given["hidden"].clone().requires_grad_()
    head = Head(given["weight"][:own].clone())
    with Payload() as forward, AllocationTracker() as tracker, FlopCounterMode(display=False) as flops:
        logprobs = vocab_parallel_logprobs(hidden, head, given["targets"], memory_budget=4 * max(own, 1) * 5)
    with Payload() as backward, FlopCounterMode(display=False) as more:
        logprobs.sum().backward()
    return {
        "forward": forward.received("all_reduce"),
        "agreed": forward.received("all_gather"),
        "backward": backward.received("all_reduce"),
        "flops": flops.get_total_flops(),
        "more_flops": more.get_total_flops(),
        "largest": tracker.largest,
        "rows": own,
    }


def shapes(parts: list[int]) -> dict[str, float]:
    """Leading dimensions, no positions, and no gradient."""
    given, rank = inputs(), dist.get_rank()
    rows = slice(sum(parts[:rank]), sum(parts[: rank + 1]))
    head, own = Head(given["weight"]), Head(given["weight"][rows])
    hidden, targets = given["hidden"].reshape(4, 10, WIDTH), given["targets"].reshape(4, 10)
    with torch.no_grad():
        found = vocab_parallel_logprobs(hidden, own, targets)
    empty = given["hidden"][:0].requires_grad_()
    nothing = vocab_parallel_logprobs(empty, own, targets.reshape(-1)[:0])
    nothing.sum().backward()
    assert empty.grad is not None
    assert (nothing.shape, empty.grad.shape, found.requires_grad) == ((0,), (0, WIDTH), False)
    return {"leading": error([selected_logprobs(hidden, head, targets)], [found])}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    some, others = PARTS[dist.get_world_size()]
    result = {
        "agreement": agreement(some) | {f"{key}, other parts": value for key, value in agreement(others).items()},
        "half": half(some),
        "confident": confident(some),
        "controls": controls(some),
        "refusals": refusals(),
        "costs": costs(some),
        "shapes": shapes(some),
    }
    (Path(sys.argv[1]) / f"{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.destroy_process_group()
