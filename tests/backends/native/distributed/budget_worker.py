"""Real steps of small Llamas on two processes: what was predicted, and what was held and received."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from many_ranks.payload import Payload
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from pullback.backends import AdamParams, TorchBackend
from pullback.backends.native import HFModel
from pullback.backends.native.dtensors import local_part
from pullback.backends.native.models.lora import add_lora
from pullback.testing import example_datums
from pullback.testing.models.llama import random_llama

LENGTHS = (16, 9, 16, 16, 14, 16, 16, 11)


def storages(tensors: Sequence[Tensor]) -> int:
    """Bytes of the storages that tensors lie in, each once."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(found.values())


def groups(module: torch.nn.Module) -> Iterator[Any]:
    """FSDP's groups of parameters."""
    for part in module.modules():
        if isinstance(part, torch.distributed.fsdp.FSDPModule):
            yield part._get_fsdp_state()._fsdp_param_group


def gathered(module: torch.nn.Module) -> int:
    """Bytes of whole weights, and of the buffers in which others arrive."""
    size = 0
    for group in groups(module):
        size += storages([t for p in group.fsdp_params for t in p.all_gather_outputs])
        if group._all_gather_result is not None:
            size += storages([group._all_gather_result.all_gather_output])
    return size


def whole_gradients(module: torch.nn.Module) -> int:
    """Bytes of whole gradients that wait to be reduced."""
    found = []
    for p in (p for group in groups(module) for p in group.fsdp_params):
        waiting = p.unsharded_accumulated_grad
        waiting = p._unsharded_param.grad if waiting is None and hasattr(p, "_unsharded_param") else waiting
        found += [] if waiting is None else [waiting]
    return storages(found)


def made(case: dict[str, Any]) -> tuple[HFModel, DeviceMesh, TorchBackend]:
    """Return the model of a case, spread over the processes."""
    vocab = 510 if case["vocab_parallel"] else 512
    model = random_llama(
        dtype=getattr(torch, case["dtype"]), vocab_size=vocab, num_hidden_layers=4, num_key_value_heads=2
    )
    torch.manual_seed(0)  # of the adapter, which must be the same on every process
    module = HFModel(add_lora(model, 4) if case["lora"] else model)
    names = ("replicas", "shards")[-len(case["mesh"]) :]
    mesh = init_device_mesh("cpu", tuple(case["mesh"]), mesh_dim_names=names)
    options = {"reshard": case["reshard"], "vocab_parallel": case["vocab_parallel"]}
    return module, mesh, TorchBackend(module, mesh=mesh, **options, token_budget=32)


def watched(module: HFModel, engine: Any, copied: int) -> dict[str, int]:
    """Return the most that is whole at once, which is kept up to date in every forward, backward and reduction.

    Args:
        module: the model.
        engine: of its backend.
        copied: bytes of weights that are copies of shards.
    """
    peaks = {"gathered_weights": 0, "gathered_gradients": 0}

    def look(_: Any = None) -> None:
        peaks["gathered_weights"] = max(peaks["gathered_weights"], gathered(module) + copied)
        peaks["gathered_gradients"] = max(peaks["gathered_gradients"], whole_gradients(module))

    def look_in_both(part: torch.nn.Module, inputs: Any, output: Any) -> None:
        look()
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(look)

    for part in module.modules():
        part.register_forward_hook(look_in_both)
    reduce = engine._shards.reduce

    def look_and_reduce(*given: Any) -> Any:
        look()
        return reduce(*given)

    engine._shards.reduce = look_and_reduce
    return peaks


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Make one step; return numbers by name."""
    module, mesh, backend = made(case)
    engine: Any = backend._everywhere
    own = {p.untyped_storage().data_ptr() for p in map(local_part, module.parameters())}
    rows = [module.head().weight] if case["vocab_parallel"] else []  # where shards are masters, a copy
    peaks = watched(module, engine, storages([w for w in rows if w.untyped_storage().data_ptr() not in own]))
    data = example_datums(list(LENGTHS), seed=3, vocab_size=500)
    loss: Any = "cross_entropy" if case["streamed"] else (lambda data, logprobs: (-sum(x.sum() for x in logprobs), {}))
    plan = backend.plan(loss, data)
    with Payload(head=mesh.get_group(mesh.ndim - 1) if case["vocab_parallel"] else None) as payload:
        act = backend.forward_backward if case["streamed"] else backend.forward_backward_custom
        result = act(data, loss).result()
        gradients = storages([local_part(p.grad) for p in engine.local.parameters.values()])
        backend.optim_step(AdamParams(learning_rate=1e-3)).result()
    held = {"gradients": gradients, "graphs": result.metrics["graph_bytes:max"], **peaks}
    return {
        "rank": torch.distributed.get_rank(),
        "predicted": dict(plan.rank_bytes),
        "traffic": dict(plan.bytes_moved),
        "held": {**resting(module, engine.local.optimizer.to_tensors()), **held},
        "received": received(payload),
        "agreements": payload.told(torch.uint8, torch.int64, torch.float64),
        "targets": sum(LENGTHS),
    }


def resting(module: HFModel, state: dict[str, Tensor]) -> dict[str, int]:
    """Return bytes of the weights and of an optimizer's state, by what they are."""
    return {
        "weights": storages([local_part(p) for p in module.parameters()]),
        "masters": storages([local_part(t) for name, t in state.items() if name.startswith("master:")]),
        "moments": storages([local_part(t) for name, t in state.items() if name.startswith("exp_avg")]),
    }


def received(payload: Payload) -> dict[str, float]:
    """Return the bytes that came from other processes, by what they were for."""
    return {
        "gathers": payload.gathered,
        "reductions": payload.reduced,
        "replicas": payload.replicated,
        "logprobs": payload.told(torch.float32),
        "head": payload.scored,
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    cases = json.loads((folder / "cases.json").read_text())
    torch.distributed.init_process_group("gloo")
    found = [run(case) for case in cases]
    (folder / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()
