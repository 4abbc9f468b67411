"""One rank of a job in which one process fails, and all of them write what they were told, and what they have left."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from many_ranks.failing_cases import (
    CASES,
    DATA,
    NEXT,
    PARAMS,
    PATIENCE,
    WORKS,
    make,
    on_one,
    only_on,
    out_of_memory,
    summed,
    with_token,
)
from many_ranks.lost_groups import alone, resumed
from many_ranks.outcomes import Outcome, difference, train, tried, weights
from safetensors.torch import load_file, save_file

from pullback.backends import TorchBackend
from pullback.backends.native.distributed.agreement.agreement import Agreement
from pullback.testing import TinyLM


def failing(name: str, many: TorchBackend, one: TorchBackend) -> Outcome:
    """Let one case fail, and look at what is left, and whether what comes next is what one process does."""
    for backend in (many, one):
        backend.forward_backward(DATA, "ppo").result()
    before = {key: g.clone() for key, g in many.gradients().items()}
    told = tried(lambda: CASES[name](many))
    told["moved"] = difference(many.gradients(), before)
    return told | goes_on(many, one)


def goes_on(many: TorchBackend, one: TorchBackend) -> Outcome:
    for backend in (many, one):
        backend.forward_backward_custom(NEXT, summed).result()
        backend.optim_step(PARAMS).result()
    return {"next": difference(weights(many), weights(one))}


def memory(name: str, folder: Path, many: TorchBackend, one: TorchBackend) -> Iterator[tuple[str, Outcome]]:
    """Run out of memory on rank 1: once, so that all try again, and always."""
    for after in (0, 1):
        budget = many._native.memory
        budget.tokens, budget.graphs = 16, None  # as at the beginning
        with only_on(1, partial(out_of_memory, 1, after)):
            told = tried(lambda: WORKS[name](many))
        WORKS[name](one)
        yield f"{name}, memory short once after {after}", told | goes_on(many, one)
    starved = make(folder)
    WORKS["streamed"](starved)
    before = {key: g.clone() for key, g in starved.gradients().items()}
    with only_on(1, partial(out_of_memory, 10**6)):
        told = tried(lambda: WORKS[name](starved))
    yield f"{name}, no memory", told | {"moved": difference(starved.gradients(), before)}


def half_stepped(folder: Path) -> Outcome:
    """Rank 1 fails in the optimizer, when rank 0 has changed its weights: no rank goes on without loading."""
    many, one = make(folder), make(folder, mesh=None)
    for backend in (many, one):
        backend.forward_backward(DATA, "ppo").result()
        backend.optim_step(PARAMS).result()
    path = many.save_state("before", overwrite=True).result().path
    many.forward_backward(NEXT, "ppo").result()
    failing = mock.patch.object(torch.optim.AdamW, "step", side_effect=torch.OutOfMemoryError("planted"))
    with only_on(1, lambda: failing):
        told = tried(lambda: many.optim_step(PARAMS))
    told["again"] = tried(lambda: many.optim_step(PARAMS))
    many.discard_gradients()
    many.load_state_with_optimizer(path).result()
    for backend in (many, one):
        backend.forward_backward(NEXT, "ppo").result()
        backend.optim_step(PARAMS).result()
    return told | {"next": difference(weights(many), weights(one))}


def constructed(folder: Path) -> Iterator[tuple[str, Outcome]]:
    """Give ranks different models, and different settings."""
    rank = dist.get_rank()
    yield "other weights", tried(lambda: TorchBackend(TinyLM(seed=rank), timeout=PATIENCE))
    yield "other budget", tried(lambda: TorchBackend(TinyLM(), token_budget=64 + rank, timeout=PATIENCE))
    yield "other seed", tried(lambda: TorchBackend(TinyLM(), seed=rank, timeout=PATIENCE))
    frozen = TinyLM(seed=rank).requires_grad_(False)
    backend = make(folder)
    (folder / "empty").mkdir(exist_ok=True)
    yield "missing checkpoint", tried(lambda: backend.load_state(folder / "empty"))
    yield from other_files(folder, backend)
    yield "nothing trained", tried(lambda: TorchBackend(on_one(frozen, TinyLM()), timeout=PATIENCE))


def other_files(folder: Path, backend: TorchBackend) -> Iterator[tuple[str, Outcome]]:
    """Load checkpoints whose tensors have other dtypes or shapes than this model's."""
    alone = folder / f"alone-{dist.get_rank()}"
    models = {"other dtype": TinyLM(tied=True, dtype=torch.float32), "other shape": TinyLM(tied=True, max_positions=32)}
    for name, model in models.items():
        TorchBackend(model, mesh=None, checkpoint_dir=alone).save_state(saved(name)).result()
    one = make(alone, mesh=None)
    train(one, range(1))
    one.save_state(saved("other moments")).result()
    halve(alone / saved("other moments"))
    dist.barrier()
    for name in (*models, "other moments"):
        before = weights(backend)
        told = tried(partial(backend.load_state_with_optimizer, folder / "alone-0" / saved(name)))
        yield name, told | {"moved": difference(weights(backend), before)}


def saved(name: str) -> str:
    return name.replace(" ", "-")


def halve(folder: Path) -> None:
    """Make one second moment of a checkpoint float32, with the digest that goes with it."""
    file, manifest = folder / "optimizer.safetensors", folder / "manifest.json"
    moments = load_file(file)
    moments["exp_avg_sq:norm"] = moments["exp_avg_sq:norm"].float()
    save_file(moments, file)
    said = json.loads(manifest.read_text())
    said["files"][file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(said))


def silent(folder: Path) -> Outcome:
    """Without agreements, other data on one rank finishes, with another gradient."""

    def nothing(self: Agreement, stage: str, *digests: bytes, **options: Any) -> None:
        return

    many, one = make(folder), make(folder, mesh=None)
    with mock.patch.object(Agreement, "meet", nothing):
        told = tried(lambda: many.forward_backward(on_one(with_token(DATA, 5), DATA), "cross_entropy"))
    one.forward_backward(DATA, "cross_entropy").result()
    return told | {"moved": difference(many.gradients(), one.gradients())}


def together(folder: Path) -> Outcome:
    """Cases that leave the group whole, one after the other on the same backends."""
    found: Outcome = {}
    for reshard in (False, True):
        kind = "resharded" if reshard else "whole"
        many, one = make(folder, reshard=reshard), make(folder, mesh=None)
        found |= {f"{name}, {kind}": failing(name, many, one) for name in CASES}
        for name in () if reshard else WORKS:
            found |= memory(name, folder, many, one)
    return found | {"optimizer": half_stepped(folder), "silent": silent(folder), **dict(constructed(folder))}


def meet(folder: Path, what: str) -> None:
    """Wait until every process is here: what it imports can take longer than the others wait for it later."""
    (folder / f"{what}-{os.environ['RANK']}.here").touch()
    while len(list(folder.glob(f"{what}-*.here"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.01)


def main(what: str, target: str) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    folder = Path(target)
    works: dict[str, Callable[[Path], Outcome]] = {
        "resume": resumed,
        "together": together,
    }
    meet(folder, what)
    found = works[what](folder) if what in works else alone(what, folder)
    (folder / f"{what}-{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
