"""One rank of a job that exports models from all ranks together, and from one process, and compares the files."""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from many_ranks.many_cases import MODELS, PARAMS, batch
from torch import nn

from pullback.backends import TorchBackend
from pullback.backends.native import HFModel
from pullback.testing import TinyLM, random_llama

__all__ = ["CASES", "FEW"]


def half() -> HFModel:
    """Trained whole in bfloat16, whose shards are fp32 masters."""
    return HFModel(random_llama(vocab_size=24, max_position_embeddings=128, dtype=torch.bfloat16))


# The model, how it is spread, and how it is exported.
CASES: Final[dict[str, tuple[Callable[[], nn.Module], dict[str, Any], dict[str, Any]]]] = {
    "adapter, merged": (MODELS["lora"], {"reshard": False}, {}),
    "adapter, alone": (MODELS["lora"], {"reshard": True}, {"merged": False}),
    "head in parts": (MODELS["full"], {"reshard": True, "vocab_parallel": True}, {}),
    "tied": (MODELS["tied"], {"reshard": False}, {"dtype": "float32"}),
    "adapter on the head, a norm beside it": (MODELS["head"], {"reshard": True}, {}),
    "experts": (MODELS["experts"], {"reshard": False}, {}),
    "checkpointing": (MODELS["checkpointing"], {"reshard": False}, {}),
    "bfloat16": (half, {"reshard": False}, {}),
    "frozen weights kept whole": (MODELS["lora"], {"shard_frozen": False}, {}),
}
FEW: Final = ("adapter, merged", "adapter, alone", "head in parts")


def files(folder: Path) -> dict[str, str]:
    """Return a digest of each file; of a config with its lists in order, as peft writes the elements of sets in any."""
    return {path.name: _digest(path) for path in sorted(folder.iterdir())}


def _digest(path: Path) -> str:
    raw = path.read_bytes()
    if path.suffix == ".json":
        fields = {key: sorted(x) if isinstance(x, list) else x for key, x in json.loads(raw).items()}
        raw = json.dumps(fields, sort_keys=True).encode()
    return hashlib.sha256(raw).hexdigest()


def tried(name: str, folder: Path) -> dict[str, Any]:
    """Export the same trained weights from all ranks, and from one; and go on training."""
    make, spread, options = CASES[name]
    place = folder / name.replace(" ", "-")
    one = TorchBackend(make(), mesh=None, checkpoint_dir=place / f"of-{dist.get_rank()}")
    one.forward_backward(batch(), "ppo").result()
    one.optim_step(PARAMS).result()
    one.save_state("trained").result()
    dist.barrier()
    many = TorchBackend(make(), timeout=60, checkpoint_dir=place / "of-many", **spread)
    many.load_state(place / "of-0" / "trained").result()
    before = [many.forward(batch()).result(), many.forward_backward(batch(), "ppo").result()][0]
    path = many.export(place / "many", **options).result().path
    after = many.forward(batch()).result()
    expected = one.export(place / f"one-{dist.get_rank()}", **options).result().path
    pairs = zip(before.loss_fn_outputs, after.loss_fn_outputs, strict=True)
    many.optim_step(PARAMS).result()
    said = [many.checkpoint_bytes(), many.checkpoint_bytes(everything=False)]
    saved = [many.save_state("all").result().path, many.save_weights("weights").result().path]
    return {
        "bytes": [
            (size, sum(file.stat().st_size for file in Path(at).iterdir()))
            for size, at in zip(said, saved, strict=True)
        ],
        "same path": path == str(place / "many"),
        "differ": sorted(n for n, digest in files(Path(expected)).items() if files(place / "many").get(n) != digest),
        "files": sorted(files(place / "many")),
        "unchanged": all(torch.equal(a["logprobs"].to_torch(), b["logprobs"].to_torch()) for a, b in pairs),
    }


def failures(folder: Path) -> dict[str, Any]:
    """What fails, on one rank or on all, is everybody's; nothing is written, and gradients stay."""
    rank, taken, below = dist.get_rank(), folder / "taken", folder / "file" / "below"
    if rank == 0:
        taken.mkdir()
        (folder / "file").write_text("")
    dist.barrier()
    backend = TorchBackend(MODELS["lora"](), timeout=60)
    beside = TorchBackend(MODELS["head"](), timeout=60)
    own = TorchBackend(TinyLM(), timeout=60)
    backend.forward_backward(batch(), "ppo").result()
    gradients = {name: g.clone() for name, g in backend.gradients().items()}
    works: dict[str, Callable[[], Any]] = {
        "taken": lambda: backend.export(taken),
        "below a file": lambda: backend.export(below),
        "other folders": lambda: backend.export(folder / f"rank-{rank}"),
        "other choices": lambda: backend.export(folder / "x", merged=rank == 0),
        "dtype": lambda: backend.export(folder / "x", merged=False, dtype="float32"),
        "beside": lambda: beside.export(folder / "x", merged=False),
        "own": lambda: own.export(folder / "x"),
    }
    found: dict[str, Any] = {name: str(_error(work)) for name, work in works.items()}
    left = backend.gradients()
    return found | {
        "moved": max(float((left[name] - g).abs().max()) for name, g in gradients.items()),
        "written": sorted(path.name for path in folder.iterdir() if path.name in ("x", "rank-0", "rank-1")),
    }


def _error(work: Callable[[], Any]) -> str:
    error = work().exception()
    return f"{type(error).__name__}: {error}"


def main(target: str, what: str) -> None:
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    torch.set_num_threads(1)
    folder = Path(target)
    dist.init_process_group("gloo")
    found = {name: tried(name, folder) for name in (CASES if what == "whole" else FEW)}
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found | {"failures": failures(folder)}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:3])
