"""What verl's engines can be asked, and a share of a call as they take it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError, UnsupportedError, require_extra
from ..calls.prepared import PreparedCall
from ..calls.requests import ScoreRequest

__all__ = ["batch_settings", "require_expressible", "to_batch"]


def batch_settings(verl: Any) -> dict[str, Any]:
    """Return how an engine runs batches, under verl's keys."""
    dynamic = verl.engine_config.use_dynamic_bsz
    key = "max_token_len_per_gpu" if dynamic else "micro_batch_size_per_gpu"
    if not getattr(verl.engine_config, key):
        raise ConfigError(f"engine_config.{key} is not set; say how much a micro-batch may hold")
    model = {name: getattr(verl.model_config, name) for name in ("use_remove_padding", "use_fused_kernels")}
    return {**model, "use_dynamic_bsz": dynamic, key: getattr(verl.engine_config, key), "calculate_entropy": False}


def require_expressible(call: PreparedCall) -> None:
    """Raise `UnsupportedError` with the first datum that asks for what verl does not compute."""
    for i, request in enumerate(call.requests):
        if request.targets.dim() != 1:
            many = request.targets.shape[1]
            raise UnsupportedError(
                f"datum {i}: has {many} targets at a position, and verl scores one; use TorchBackend"
            )
        other = (request.targets[:-1] != request.tokens[1:]).nonzero().flatten().tolist()
        if other:
            target, follows = int(request.targets[other[0]]), int(request.tokens[other[0] + 1])
            raise UnsupportedError(
                f"datum {i}: target token {other[0]} is {target}, but the input goes on with {follows}, and verl scores the "
                "sequence's own next tokens only; use TorchBackend"
            )


def to_batch(
    requests: Sequence[ScoreRequest],
    own: Sequence[int],
    rows: int,
    settings: Mapping[str, Any],
    pulled: Mapping[int, Tensor],
) -> Any:
    """Return some datums as a TensorDict: inputs with their last targets, so that the last entry of each row is nobody's.

    Args:
        requests, own: of a call, and which of them.
        rows: of the batch; what is missing are dummies, so that all processes run as many micro-batches.
        settings: those of `batch_settings`.
        pulled: cotangents by datum; 0 where there is none.
    """
    tensordict, tools = (
        require_extra(name, "verl", "verl's batch") for name in ("tensordict", "verl.utils.tensordict_utils")
    )
    asked = [requests[i] for i in own]
    dummies = [torch.zeros(2, dtype=torch.int64)] * (rows - len(own))
    tokens = [torch.cat([request.tokens, request.targets[-1:]]) for request in asked] + dummies
    cotangents = [torch.zeros(len(row)) for row in tokens]
    for row, i in enumerate(own):
        cotangents[row][:-1] = pulled.get(i, torch.zeros(()))
    columns = {
        "input_ids": tokens,
        "position_ids": [torch.arange(len(row)) for row in tokens],
        "loss_mask": [torch.ones(len(row)) for row in tokens],
        "cotangent": cotangents,
    }
    nested = {name: torch.nested.as_nested_tensor(column, layout=torch.jagged) for name, column in columns.items()}
    batch = tensordict.TensorDict(nested, batch_size=[rows])
    plain = all(request.temperature == 1.0 for request in requests)  # spares a copy of the logits
    if not plain:
        batch["temperature"] = torch.tensor([request.temperature for request in asked] + [1.0] * len(dummies))
    tools.assign_non_tensor(batch, **settings, **({"temperature": 1.0} if plain else {}))
    return batch
