"""Between this library's types and the SDK's."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...datums.types import Datum, TensorData
from ...errors import require_extra
from ..cotangents import scored
from ..types import AdamParams, ForwardBackwardOutput, Rollout, SamplingParams

__all__ = ["bare", "logprobs_of", "output_of", "ready", "rollouts_of", "sampling_params", "sdk", "send_step"]

_MODE = "grad_accumulation_normalization"
_ADAM = ("learning_rate", "beta1", "beta2", "eps", "weight_decay", "grad_clip_norm")


def sdk() -> Any:
    """Return the tinker SDK.

    Raises:
        MissingExtraError: it is not installed.
    """
    return require_extra("tinker", "remote", "RemoteBackend")


def ready(client: Any, timeout: float | None = None) -> Any:
    """Return the client that a call of the SDK made; newer SDKs wrap it into a future."""
    return client.result(timeout) if hasattr(client, "result") else client


def bare(data: Sequence[Datum]) -> list[Datum]:
    """Return what a forward needs: targets, and weights of zero."""
    found = []
    for datum in map(scored, data):
        targets = datum.loss_fn_inputs["target_tokens"]
        inputs = {"target_tokens": targets, "weights": TensorData(torch.zeros(targets.shape))}
        found.append(Datum(datum.model_input, inputs))
    return found


def logprobs_of(result: Any) -> list[Tensor]:
    """Return each datum's log-probs."""
    return [torch.as_tensor(one["logprobs"].to_torch()).float() for one in result.loss_fn_outputs]


def output_of(result: Any) -> ForwardBackwardOutput:
    """Return a result with all that the service said."""
    outputs = [{k: TensorData(torch.as_tensor(v.to_torch())) for k, v in one.items()} for one in result.loss_fn_outputs]
    return ForwardBackwardOutput(outputs, dict(result.metrics))


def send_step(trainer: Any, params: AdamParams, mode: str | None, normalizes: bool) -> Any:
    """Send an optimizer step, with its normalisation if the service has one.

    Fireworks' client has an argument for it. The tinker SDK has not, but passes on the parameters of an optimizer that it
    does not know: this is how a service of ours gets it.
    """
    given = {name: getattr(params, name) for name in _ADAM}
    if not normalizes:
        return trainer.optim_step(sdk().AdamParams(**given))
    explicit = {_MODE: mode or "none"}
    if _MODE in inspect.signature(trainer.optim_step).parameters:
        return trainer.optim_step(sdk().AdamParams(**given), **explicit)
    optimizer = require_extra("tinker.types.optimizer", "remote", "RemoteBackend")
    return trainer.optim_step(optimizer.OptimParamsBase(type="adamw", **given, **explicit))


def sampling_params(params: SamplingParams) -> Any:
    """Return the SDK's."""
    return sdk().SamplingParams(
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        seed=params.seed,
        stop=None if params.stop is None else list(params.stop),
    )


def rollouts_of(results: Sequence[Any], params: SamplingParams, version: int) -> list[Rollout]:
    """Return the samples of all prompts, prompt-major."""
    return [
        Rollout(
            prompt_index=i,
            tokens=[int(t) for t in one.tokens],
            logprobs=[float(x) for x in one.logprobs or ()],
            stop_reason=str(one.stop_reason),
            weights_version=version,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
        )
        for i, result in enumerate(results)
        for one in result.sequences
    ]
