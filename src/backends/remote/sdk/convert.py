"""Between this library's types and an SDK's, where the SDKs agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ....datums.types import Datum, TensorData
from ...calls.requests import scored
from ...types import ForwardBackwardOutput, Rollout, SamplingParams

__all__ = ["bare", "logprobs_of", "output_of", "ready", "requests_of", "rollouts_of"]


def ready(client: Any, timeout: float | None = None) -> Any:
    """Return what a call of an SDK made; some calls wrap it into a future."""
    return client.result(timeout) if hasattr(client, "result") else client


def requests_of(trainer: Any, data: Sequence[Any]) -> int:
    """Return into how many requests a client cuts a call, each of which may fail alone; one a datum where it does not say."""
    cut = getattr(trainer, "_chunked_requests_generator", None)
    return len(data) if cut is None else sum(1 for _ in cut(data))


def bare(data: Sequence[Datum]) -> list[Datum]:
    """Return what a forward needs: targets, and weights of zero."""
    forwarded = []
    for datum in map(scored, data):
        targets = datum.loss_fn_inputs["target_tokens"]
        inputs = {"target_tokens": targets, "weights": TensorData(torch.zeros(targets.shape))}
        forwarded.append(Datum(datum.model_input, inputs))
    return forwarded


def logprobs_of(result: Any) -> list[Tensor]:
    """Return each datum's log-probs."""
    return [torch.as_tensor(output["logprobs"].to_torch()).float() for output in result.loss_fn_outputs]


def output_of(result: Any) -> ForwardBackwardOutput:
    """Return a result with all that the service said."""
    outputs = [
        {k: TensorData(torch.as_tensor(v.to_torch())) for k, v in output.items()} for output in result.loss_fn_outputs
    ]
    return ForwardBackwardOutput(outputs, dict(result.metrics))


def rollouts_of(results: Sequence[Any], params: SamplingParams, version: int) -> list[Rollout]:
    """Return the samples of all prompts, prompt-major."""
    return [
        Rollout(
            prompt_index=i,
            tokens=[int(t) for t in sequence.tokens],
            logprobs=[float(x) for x in sequence.logprobs or ()],
            stop_reason=str(sequence.stop_reason),
            weights_version=version,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
        )
        for i, result in enumerate(results)
        for sequence in result.sequences
    ]
