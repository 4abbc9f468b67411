"""One rank of a job that trains every case on all ranks and on one process, and writes how far they are apart."""

from __future__ import annotations

import itertools
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from many_ranks.many_cases import LOSSES, MODELS, Given, apart, batch, steps
from torch.distributed.device_mesh import init_device_mesh

from pullback.backends import TorchBackend
from pullback.backends.native.models.lora import LoraChoice
from pullback.service import Base

BATCHES = {
    "even": [batch()],
    "odd": [batch((6, 4)), batch((5, 7, 3, 9, 2, 8), seed=5)],
    "one": [batch((5, 4), seed=6)],
    "alone": [batch((5,), seed=6)],  # without token 0
}


# One rank has no datum, and reaches a weight that nobody trains: in one pass, and with graphs that wait for their cotangents.
KEEPING_STEP: Any = [("routed", loss, "alone", None, True) for loss in ("cross_entropy", "ordered")]


def cases(whole: bool) -> list[tuple[str, str, str, Any, bool]]:
    """Return model, loss, batch, normalization and whether layers are resharded."""
    if not whole:
        return [("full", "coupled", "odd", None, True), ("lora", "ppo", "odd", "num_sequences", False), *KEEPING_STEP]
    modes = ("num_loss_tokens", "num_sequences")
    found: list[tuple[str, str, str, Any, bool]] = [
        *(
            (m, loss, "even", None, reshard)
            for m in MODELS
            for loss in ("grpo", "coupled")
            for reshard in (False, True)
        ),
        *(("full", loss, kind, None, reshard) for loss in LOSSES for kind, reshard in (("odd", False), ("one", True))),
        *(("lora", loss, "odd", None, True) for loss in LOSSES),
        *(("lora", loss, "odd", mode, False) for loss in ("ppo", "ordered") for mode in modes),
        ("lora", "ppo", "odd", "auto", False),
        ("lora", "dpo", "one", None, True),
        *KEEPING_STEP,
    ]
    return list(dict.fromkeys(found))


def name_of(model: str, loss: str, kind: str, mode: Any, reshard: bool) -> str:
    return f"{model}-{loss}-{kind}-{mode}-{'resharded' if reshard else 'whole'}"


def tried(model: str, loss: str, kind: str, mode: Any, reshard: bool) -> dict[str, float]:
    given: Given = LOSSES[loss]
    many = TorchBackend(MODELS[model](), reshard=reshard, timeout=60, token_budget=16)
    one = TorchBackend(MODELS[model](), mesh=None, token_budget=16)
    return apart(steps(many, given, BATCHES[kind], mode), steps(one, given, BATCHES[kind], mode))


def hybrid(model: str) -> dict[str, float]:
    """Two replicas of two shards."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    many = TorchBackend(MODELS[model](), mesh=mesh, reshard=False, timeout=60)
    one = TorchBackend(MODELS[model](), mesh=None)
    return apart(steps(many, "grpo", [batch()]), steps(one, "grpo", [batch()]))


def shared(loss: str, reshard: bool) -> dict[str, float]:
    """Two adapters on one base whose weights every process keeps, trained in turn; and what of the base was copied."""
    tied: Any = MODELS["tied"]()
    base, choices = Base("base", tied.model), (LoraChoice(rank=4), LoraChoice(rank=2, train_unembed=True))
    options: dict[str, Any] = {"reshard": reshard, "timeout": 60, "token_budget": 16, "shard_frozen": False}
    many = [TorchBackend(base.adapted(lora), **options) for lora in choices]
    one = [TorchBackend(base.adapted(lora), mesh=None, token_budget=16) for lora in choices]
    found = [
        apart(steps(m, LOSSES[loss], BATCHES["odd"]), steps(o, LOSSES[loss], BATCHES["odd"]))
        for m, o in zip(many, one, strict=True)
    ]
    own = {p.data_ptr() for p in base.model.parameters()}
    copied = sum(p.data_ptr() not in own for m in many for p in m.model.parameters() if not p.requires_grad)
    return {
        "copied": float(copied),
        **{f"{i}: {name}": off for i, each in enumerate(found) for name, off in each.items()},
    }


SHARED = [("ppo", False)]


def main(target: str, whole: str) -> None:
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    torch.set_num_threads(1)
    found = {name_of(*case): tried(*case) for case in cases(whole == "whole")}
    found |= {f"shared-{loss}-{reshard}": shared(loss, reshard) for loss, reshard in SHARED}
    if dist.get_world_size() == 4:
        found |= {f"{model}-hybrid": hybrid(model) for model in ("full", "lora")}
    Path(f"{target}-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*itertools.islice(sys.argv, 1, 3))
