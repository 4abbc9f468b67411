"""What a call, or a step on paper, costs one process: budgets of a model that is there, and of one that is not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from ....errors import UnsupportedError
from ....ops.own_positions import Positions, exchange_bytes
from ...calls.prepared import PreparedCall
from ...types import Plan
from ..engine import NativeEngine
from ..execution.graph_size import head_bytes
from ..plan import recomputed
from .budget import Placement, RankMemory, Step, Traffic, Weight, rank_memory, traffic
from .budget.outline import graph_shape, model_outline
from .fsdp import gathered_dtype
from .schedule import Share
from .sharding import Shards, sharded_units
from .vocabulary.cost import positions_together, rows_bytes, shard_group

__all__ = ["TrainingBudget", "plan_rank", "plan_training", "weights_of"]


@final
@dataclass(frozen=True)
class TrainingBudget:
    """What training takes on one process.

    Attributes:
        placement: the processes.
        step: what each does between two optimizer steps.
        memory: what it holds.
        traffic: what it receives in a step.
        parameters, trained: of the whole model.
    """

    placement: Placement
    step: Step
    memory: RankMemory
    traffic: Traffic
    parameters: int
    trained: int

    def to_json(self) -> dict[str, Any]:
        """Return everything by name."""
        return {
            "ranks": self.placement.ranks,
            "replicas": self.placement.replicas,
            "reshard": self.placement.reshard,
            "parameters": self.parameters,
            "trained": self.trained,
            "rank_bytes": self.memory.to_json(),
            "bytes_moved": self.traffic.to_json(),
        }


def plan_training(
    config: Any,
    placement: Placement,
    *,
    tokens: int,
    dtype: str | torch.dtype = "float32",
    lora: Any = None,
    gradient_checkpointing: bool = False,
    micro_batches: int = 1,
    retained: int = 1,
    calls: int = 1,
    graph_bytes_per_token: float | None = None,
    vocab_parallel: bool = False,
    gpu: bool = True,
) -> TrainingBudget:
    """Return what training takes on one process, from a config alone: no weight is made or loaded.

    Args:
        config: of a transformers model.
        placement: the processes.
        tokens: of one micro-batch on a process, all of them scored.
        dtype: of the weights; adapters are fp32.
        lora: as for `TorchBackend.from_pretrained`; None trains every parameter.
        gradient_checkpointing: layers run again in the backward.
        micro_batches: of one process in a step.
        retained: micro-batches whose graphs wait at once: 1 for a registered loss, all for a function of all log-probs.
        calls: gradient operations of a step.
        graph_bytes_per_token: as measured; None: by `GraphShape`, for a Llama-shaped model.
        vocab_parallel: each process of a replica holds some rows of the head.
        gpu: the model lies on one, where chunks of logits are larger.

    Raises:
        UnsupportedError: no number of bytes per token is known for such a model, it is none that can be planned, or its head
            cannot be cut.
        ConfigError: a number is out of range.
    """
    text = config.get_text_config()
    model = model_outline(config, dtype=dtype, lora=lora)
    cut = _head_of(model) if vocab_parallel and placement.sharded else []
    weights = weights_of(model, cut)
    if any(w.half for w in weights) and dtype in ("float16", torch.float16) and placement.sharded:
        raise UnsupportedError("float16 is not trained on several processes; use bfloat16")
    per_token, again = graph_bytes_per_token, 0.0
    if per_token is None:
        shape = graph_shape(model, text, checkpointed=gradient_checkpointing)
        per_token, again = shape.per_token, shape.again
    each, where = min(w.bytes_each for w in weights), {"trained": lora is None, "gpu": gpu}
    if cut:
        head, received = _rows_on_paper(text, [tokens] * placement.shards, retained, each, **where)
    else:
        head, received = head_bytes(retained * tokens, text.hidden_size, text.vocab_size, each, **where), 0.0
    step = Step(
        graph_bytes=tokens * (retained * per_token + again),
        head_bytes=head,
        head_received=micro_batches * received,
        forwards=micro_batches,
        backwards=micro_batches,
        calls=calls,
        targets=micro_batches * tokens,
    )
    return TrainingBudget(
        placement,
        step,
        rank_memory(weights, placement, step),
        traffic(weights, placement, step),
        sum(w.rows * w.row for w in weights),
        sum(w.rows * w.row for w in weights if w.trained),
    )


def plan_rank(plan: Plan, call: PreparedCall, share: Share, local: NativeEngine, shards: Shards) -> Plan:
    """Return the plan of a call with what this process holds, and what it receives in a step of this call alone.

    Args:
        plan: of one process.
        call: the call.
        share: what this process does of it.
        local: this process's part of the engine.
        shards: of its model.
    """
    weights = weights_of(local.module, [] if shards.rows is None else shards.rows.parameters)
    step = _step(call, share, local, weights)
    if shards.rows is not None:
        step = _with_rows(step, call, share, local, weights)
    placement = _placement(local, shards.reshard)
    moved = traffic(weights, placement, step)
    held = rank_memory(weights, placement, step)
    return replace(plan, rank_bytes=held.to_json(), bytes_moved=moved.to_json())


def weights_of(module: nn.Module, in_parts: Sequence[Tensor] = ()) -> list[Weight]:
    """Return each parameter of a model once, with the layer in which it is sharded, or will be.

    Args:
        module: the model.
        in_parts: weight and bias of a vocabulary-parallel head.
    """
    rows = set(in_parts)
    units = [part for part in module.modules() if isinstance(part, FSDPModule) and part is not module]
    layers = {p: i for i, layer in enumerate(units or sharded_units(module)) for p in layer.parameters()}
    computes = gathered_dtype(module)
    return [
        Weight(
            rows=p.shape[0] if p.dim() else 1,
            row=math.prod(p.shape[1:]),
            bytes_each=(computes or p.dtype).itemsize,
            trained=p.requires_grad,
            layer=layers.get(p),
            in_parts=p in rows,
        )
        for p in module.parameters()
    ]


def _head_of(model: Any) -> list[Tensor]:
    """Return what is cut of the head of an outline.

    Raises:
        UnsupportedError: it is none of its own.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not isinstance(head, nn.Linear) or head.weight is embedding.weight:
        raise UnsupportedError(
            "vocab_parallel=True cannot cut this head: it is the embedding too, or has an adapter on it"
        )
    return [*head.parameters(recurse=False)]


def _rows_on_paper(
    text: Any, together: Sequence[int], retained: int, bytes_each: int, *, trained: bool, gpu: bool
) -> tuple[float, float]:
    """Return the bytes that a process's rows of the head need, and those that it receives for them in a micro-batch.

    Args:
        text: config of the language model.
        together: positions of a micro-batch on each process that holds rows.
        retained: micro-batches whose graphs wait at once.
        bytes_each: of a number, as the model computes with it.
        trained: the head gets a gradient.
        gpu: see `plan_training`.
    """
    rows = -(-text.vocab_size // len(together))
    held = rows_bytes([together] * retained, 0, text.hidden_size, rows, bytes_each, trained=trained, gpu=gpu)
    return held, exchange_bytes([*map(Positions, together)], text.hidden_size, bytes_each, bytes_each)


def _mesh(local: NativeEngine) -> DeviceMesh:
    return cast(DeviceMesh, cast(Any, next(iter(local.parameters.values()))).device_mesh)


def _placement(local: NativeEngine, reshard: bool) -> Placement:
    mesh = _mesh(local)
    return Placement(mesh.size(), mesh.size(0) if mesh.ndim == 2 else 1, reshard)


def _step(call: PreparedCall, share: Share, local: NativeEngine, weights: list[Weight]) -> Step:
    """Return what this process does, if its step is this call."""
    settings, sizes = local.memory.settings(share.layout), local.scheduler.sizes
    keeps = call.needs_all_datums
    graphs = [[settings.meter.predict(max(f.tokens, f.most_tokens)) for f in batch] for batch in share.batches]
    if keeps:
        graphs = [[size for batch in graphs for size in batch]]
    again = {i: recomputed(batch, settings.budget) for i, batch in enumerate(graphs)}
    held = [sum(size for f, size in enumerate(batch) if f not in again[i]) for i, batch in enumerate(graphs)]
    scored = [[len(f.index.at) for f in batch] for batch in share.batches]
    targets = [sum(call.requests[i].targets.numel() for i in members) for members in share.members]
    backwards = len(share.forwards)
    return Step(
        graph_bytes=max([0.0, *held]),
        head_bytes=head_bytes(
            sum(map(sum, scored)) if keeps else max([0, *map(sum, scored)]),
            sizes.hidden,
            sizes.vocab,
            min(w.bytes_each for w in weights),
            trained=not sizes.frozen_head,
            gpu=local.memory.device.type == "cuda",
        ),
        forwards=backwards + sum(map(len, again.values())),
        backwards=backwards,
        targets=max(targets),
        broadcast=sum(targets) if keeps else 0,
        logprob_bytes=8 if any(w.bytes_each == 8 for w in weights) else 4,
    )


def _with_rows(step: Step, call: PreparedCall, share: Share, local: NativeEngine, weights: list[Weight]) -> Step:
    """Return a step whose head is cut, so that ranks score each forward together."""
    mesh, sizes = _mesh(local), local.scheduler.sizes
    group = shard_group(mesh)
    weight = max((w for w in weights if w.in_parts), key=lambda w: w.row)
    each, rows = min(w.bytes_each for w in weights), weight.shard(len(group)) // weight.row
    forwards = iter([positions_together(call, forward, group) for forward in share.together])
    batches = [[next(forwards) for _ in batch] for batch in share.batches]
    if call.needs_all_datums:
        batches = [[forward for batch in batches for forward in batch]]
    form = {"trained": weight.trained, "gpu": local.memory.device.type == "cuda"}
    counts = [[[one.count for one in forward] for forward in batch] for batch in batches]
    own = group.index(share.ranks.rank)
    return replace(
        step,
        head_bytes=max(rows_bytes(kept, own, sizes.hidden, rows, each, **form) for kept in counts),
        head_received=sum(
            exchange_bytes(forward, sizes.hidden, each, weight.bytes_each) for batch in batches for forward in batch
        ),
    )
