"""One rank of a job whose calls have something around them: autocast, a backward of one's own, other gradients elsewhere."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from helpers import TINY
from many_ranks.failing_cases import DATA, summed
from many_ranks.many_cases import VOCAB, batch
from torch import Tensor, nn

from pullback.backends import AdamParams, TorchBackend
from pullback.backends.native import HFModel
from pullback.datums import Datum, ModelInput
from pullback.testing import TinyLM, example_datums, random_llama

__all__ = ["FOREIGN", "RESHARD", "UNUSED"]

PAGE: Final = Path(__file__).parents[3] / "docs" / "distributed.md"
PARAMS: Final = AdamParams(learning_rate=1e-1, weight_decay=0.5, grad_clip_norm=1.0)
RESHARD: Final = (False, True)
UNUSED: Final = ("whole", "resharded", "cut head")
FOREIGN: Final = tuple(f"{after} on {ranks}" for after in ("nothing", "a call") for ranks in ("all", "one"))
Found = dict[str, Any]


def largest(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return the largest relative difference; infinite where the names are not the same."""
    if found.keys() != expected.keys():
        return float("inf")
    apart = [float((found[n] - x).norm() / x.norm().clamp(min=1e-30)) for n, x in expected.items()]
    return max(apart)


def error_of(work: Callable[[], Any]) -> str:
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def autocast(reshard: bool) -> float:
    """A forward and two calls under one autocast, against fp32."""
    many = TorchBackend(
        HFModel(random_llama(vocab_size=VOCAB, dtype=torch.float32, **TINY)), reshard=reshard, timeout=60
    )
    one = TorchBackend(HFModel(random_llama(vocab_size=VOCAB, dtype=torch.float32, **TINY)), mesh=None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        many.forward(batch()).result()
        for _ in range(2):
            many.forward_backward(batch(), "grpo").result()
    for _ in range(2):
        one.forward_backward(batch(), "grpo").result()
    return largest(many.gradients(), one.gradients())


class Partly(TinyLM):  # type: ignore[misc]  # the same model but for this
    """Has weights that no forward uses, and one that only long sequences reach, if any."""

    def __init__(self, tied: bool, gated: bool) -> None:
        super().__init__(tied=tied)
        self._gated = gated
        self.unused = nn.Parameter(torch.ones(4, 3, dtype=torch.float64))
        self.seldom = nn.Parameter(torch.ones(3, 7, dtype=torch.float64))

    def hidden_states(self, tokens: Tensor, positions: Tensor) -> Tensor:
        hidden = super().hidden_states(tokens, positions)
        return hidden * self.seldom.mean() if self._gated and tokens.shape[-1] > 8 else hidden


def unused(kind: str) -> Found:
    """Two steps with weight decay; the second batch alone is long enough for what is seldom reached."""
    options: dict[str, Any] = {"reshard": kind == "resharded", "vocab_parallel": kind == "cut head", "layout": "single"}
    form = (kind != "cut head", kind != "cut head")
    many = TorchBackend(Partly(*form), timeout=60, **options)
    one = TorchBackend(Partly(*form), mesh=None, layout="single")
    found = {}
    for step, data in enumerate((DATA[1:2] + DATA[3:5], DATA)):
        for backend in (one, many):
            backend.forward_backward(data, "cross_entropy").result()
        found[f"gradients {step}"] = largest(many.gradients(), one.gradients())
        for backend in (one, many):
            backend.optim_step(PARAMS).result()
    found["weights"] = largest(state_of(many), state_of(one))
    return found


def state_of(backend: TorchBackend) -> dict[str, Tensor]:
    native = backend._native
    held = {**native.parameters, **native.optimizer.to_tensors()}
    return {n: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach() for n, t in held.items()}


def foreign(case: str, reshard: bool) -> Found:
    """A backward of one's own before a call and before a step, on all ranks or on one; then all is forgotten."""
    many = TorchBackend(TinyLM(), reshard=reshard, timeout=60)
    alone = TorchBackend(TinyLM(), mesh=None)

    def backward() -> None:
        tokens = torch.zeros(1, 4, dtype=torch.int64)
        hidden = many.model.hidden_states(tokens, torch.arange(4)[None])  # type: ignore[operator]
        if case.endswith("all") or dist.get_rank() == 1:
            hidden.sum().backward()

    found = {}
    for name, work in (
        ("call", lambda: many.forward_backward(DATA, "cross_entropy").result()),
        ("step", lambda: many.optim_step(PARAMS).result()),
        ("function", lambda: many.forward_backward_custom(DATA, summed).result()),
    ):
        if case.startswith("a call") or name == "step":
            many.forward_backward(DATA, "cross_entropy").result()
        backward()
        found[name] = error_of(work)
        many.discard_gradients()
    for backend in (many, alone):
        backend.forward_backward(DATA, "cross_entropy").result()
    return {**found, "apart": largest(many.gradients(), alone.gradients())}


def retained(count: int, reshard: bool) -> float:
    """A retained forward of fewer datums than ranks."""
    many, alone = TorchBackend(TinyLM(), reshard=reshard, timeout=60), TorchBackend(TinyLM(), mesh=None)
    for backend in (many, alone):
        forward = backend.forward_retain(DATA[:count]).result()
        assert not forward.spent
        backend.backward({forward: range(count)}, DATA[:count], "cross_entropy").result()
        assert forward.spent
    return largest(many.gradients(), alone.gradients())


class Overflowing(TinyLM):  # type: ignore[misc]
    """Has finite log-probs and, where it reads token 16, a gradient that is not."""

    def hidden_states(self, tokens: Tensor, positions: Tensor) -> Tensor:
        hidden: Tensor = super().hidden_states(tokens, positions)
        if hidden.requires_grad:
            marked = (tokens == 16)[..., None]
            hidden.register_hook(lambda gradient: torch.where(marked, gradient * torch.inf, gradient))
        return hidden


def blamed() -> dict[str, list[str]]:
    """What a gradient that is not finite is said to be caused by, here and on one process, by each way to a gradient."""
    data = example_datums([5, 7, 4, 6], vocab_size=16)
    data[2] = Datum(ModelInput.from_ints([16, 3, 5, 7]), data[2].loss_fn_inputs)
    ways: dict[str, Callable[[TorchBackend], Any]] = {
        "registered": lambda b: b.forward_backward(data, "cross_entropy").result(),
        "function": lambda b: b.forward_backward_custom(data, summed).result(),
        "retained": lambda b: b.backward({b.forward_retain(data).result(): range(4)}, data, "cross_entropy").result(),
    }
    many, alone = TorchBackend(Overflowing(), reshard=False, timeout=60), TorchBackend(Overflowing(), mesh=None)
    return {way: [error_of(partial(work, b)) for b in (many, alone)] for way, work in ways.items()}


def forgotten_on_one(what: Callable[[TorchBackend], Any]) -> str:
    """One rank has forgotten a gradient, and all have added another."""
    many = TorchBackend(TinyLM(), timeout=60)
    many.forward_backward(DATA, "cross_entropy").result()
    if dist.get_rank() == 1:
        many.discard_gradients()
    return error_of(lambda: what(many))


class Buffered(TinyLM):  # type: ignore[misc]  # the same model but for this
    """Computes in bfloat16, with a correction that is kept in fp32, as routers of experts have it, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.to(torch.bfloat16)
        self.register_buffer("wide", torch.full((3,), 1.001, dtype=torch.float32))
        self.register_buffer("narrow", torch.full((3,), 1.25, dtype=torch.bfloat16))


def buffers(folder: Path) -> Found:
    """Buffers of a trained bfloat16 model: as they are here, and as one process and all find them in a checkpoint."""
    many = TorchBackend(Buffered(), timeout=60, checkpoint_dir=folder)
    one = TorchBackend(Buffered(), mesh=None)
    said = many.checkpoint_bytes()
    path = Path(many.save_state("buffers").result().path)
    written = sum(file.stat().st_size for file in path.iterdir())
    found: Found = {"here": described(many), "bytes": abs(written - said) / said}
    for name, backend in (("one", one), ("all", many)):
        for buffer in backend.model.buffers():
            buffer.zero_()
        found[name] = error_of(lambda backend=backend: backend.load_state_with_optimizer(path).result())  # type: ignore[misc]
        found[f"loaded on {name}"] = described(backend)
    return found


def described(backend: TorchBackend) -> dict[str, str]:
    return {name: f"{b.dtype} {b.float()[0]:.6f}" for name, b in backend.model.named_buffers() if b.shape == (3,)}


def page() -> str:
    """The blocks of the page, one after the other."""

    def run() -> None:
        names: Found = {}
        for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S):
            exec(compile(block, str(PAGE), "exec"), names)

    return error_of(run)


def main(target: str) -> None:
    dist.init_process_group("gloo")
    found: Found = {
        "autocast": [autocast(reshard) for reshard in RESHARD],
        "unused": {kind: unused(kind) for kind in UNUSED},
        "foreign": [
            {case: foreign(case, reshard) for case in FOREIGN if case.endswith("all") or not reshard}
            for reshard in RESHARD
        ],
        "retained": [retained(count, reshard) for count in (1, 3) for reshard in RESHARD],
        "blamed": blamed(),
        "forgotten": [
            forgotten_on_one(lambda b: b.forward_backward(DATA, "cross_entropy").result()),
            forgotten_on_one(lambda b: b.forward(DATA).result()),
        ],
        "page": page(),
        "buffers": buffers(Path(target).parent),
    }
    Path(f"{target}-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
