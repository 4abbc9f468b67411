"""One of several processes that train a tiny model in verl's FSDP engine, given the same data; see test_verl_engine."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

warnings.simplefilter("ignore")
from other_trainers import verl_tiny as tiny  # noqa: E402

from pullback.backends import AdamParams  # noqa: E402
from pullback.backends.verl import VerlEngineBackend  # noqa: E402
from pullback.errors import CheckpointError, NonFiniteError, RankFailedError, RanksDifferError  # noqa: E402


def raises(kinds: type[Exception] | tuple[type[Exception], ...], future: Any) -> str:
    """Return the message of the error that an operation must end with."""
    try:
        future.result()
    except kinds as error:
        return str(error)
    raise AssertionError(f"no {kinds}")


def train(backend: VerlEngineBackend) -> dict[str, torch.Tensor]:
    """Make a step, and return the weights."""
    backend.forward_backward(tiny.next_token_datums(), "cross_entropy").result()
    backend.optim_step(AdamParams(learning_rate=1e-2)).result()
    return tiny.weights(backend)


def main(folder: Path) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, data = dist.get_rank(), tiny.next_token_datums()
    for trained in ("full", "lora"):
        for loss in tiny.LOSSES:
            backend = make(folder, trained)
            tiny.compare(backend, tiny.same_model(folder / "model", trained), data, loss)
    by_tokens: dict[str, Any] = {"use_dynamic_bsz": True, "max_token_len_per_gpu": 13, "micro_batch_size_per_gpu": None}
    tiny.compare(make(folder, "full", **by_tokens), tiny.same_model(folder / "model", "full"), data, "orpo")
    empty_rank(make(folder, "full"), folder)
    reference_first(make(folder, "lora", mixed_precision=None))
    disagreements(make(folder, "full"), rank)
    not_finite(make(folder, "full"), rank)
    checkpoints(make(folder, "lora"), folder)
    dist.destroy_process_group()


def make(folder: Path, trained: Any, **options: Any) -> VerlEngineBackend:
    engine = tiny.tiny_engine(folder / "model", trained, **options)
    return VerlEngineBackend(engine, checkpoint_dir=folder / "checkpoints", timeout=60)


def empty_rank(backend: VerlEngineBackend, folder: Path) -> None:
    """One datum, so that all processes but one have none."""
    theirs, one = tiny.same_model(folder / "model", "full"), tiny.next_token_datums((9,))
    for each in (backend, theirs):
        each.forward_backward(one, "cross_entropy").result()
    assert tiny.gap(backend.gradients(), theirs.gradients()) < 1e-5


def reference_first(backend: VerlEngineBackend) -> None:
    """In bfloat16, verl's default: an adapter that is off in the first forward has gradients in fp32 all the same."""
    backend.reference().forward(tiny.next_token_datums()).result()
    backend.forward_backward(tiny.next_token_datums(), "dpo").result()
    assert {gradient.dtype for gradient in backend.gradients().values()} == {torch.float32}


def disagreements(backend: VerlEngineBackend, rank: int) -> None:
    """Other data, another function or a failing one on one process: all of them hear of it, and nothing has changed."""
    data = tiny.next_token_datums()
    backend.forward_backward(data, "cross_entropy").result()
    kept = backend.gradients()
    other = data[::-1]
    said = raises(RanksDifferError, backend.forward_backward(data if rank == 0 else other, "cross_entropy"))
    assert "datum 0 differs" in said, said

    def drawn(data: Sequence[Any], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        return torch.stack([x.sum() for x in logprobs]).sum() * (1 + rank), {}

    def failing(data: Sequence[Any], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        if rank == 1:
            raise ValueError("a bad reward")
        return logprobs[0].sum(), {}

    kinds = (RankFailedError, RanksDifferError)
    assert "another gradient here" in raises(kinds, backend.forward_backward_custom(data, drawn))
    assert "a bad reward" in raises((RankFailedError, ValueError), backend.forward_backward_custom(data, failing))
    raises(RanksDifferError, backend.optim_step(AdamParams(learning_rate=0.1 * (1 + rank))))
    assert all(torch.equal(gradient, kept[name]) for name, gradient in backend.gradients().items())
    assert backend.optim_step(AdamParams()).result().stepped


def not_finite(backend: VerlEngineBackend, rank: int) -> None:
    """In the shard of one process only: no process makes the step."""
    backend.forward_backward(tiny.next_token_datums(), "cross_entropy").result()
    before = tiny.weights(backend)
    name, p = next(iter(backend._engine.accumulator.parameters.items()))  # type: ignore[attr-defined]
    if rank == 1:
        p.grad.to_local()[0, 0] = float("nan")
    assert name in raises(NonFiniteError, backend.optim_step(AdamParams()))
    assert all(torch.equal(weight, before[key]) for key, weight in tiny.weights(backend).items())


def checkpoints(backend: VerlEngineBackend, folder: Path) -> None:
    """The step after loading is the uninterrupted one."""
    train(backend)
    path = backend.save_state("first").result().path
    exact = train(backend)
    backend.load_state_with_optimizer(path).result()
    assert all(torch.equal(weight, exact[name]) for name, weight in train(backend).items())
    raises((CheckpointError, RankFailedError), backend.save_state("first"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
