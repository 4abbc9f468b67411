"""Defects of backends in what they report: log-probs, loss values, and a forward that is more than a forward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ....backends.operations.futures import FinishedFuture, Future
from ....backends.types import ForwardBackwardOutput
from ....datums.types import TensorData
from .relay import Config, Relay, planted


@planted(
    "scoring_adds_no_gradient",
    "servers that implement forward as forward_backward",
    "Scoring a validation set trains on it.",
)
class ForwardLeavesAGradient(Relay):
    def forward(
        self, data: Any, loss_fn: Any = "cross_entropy", loss_fn_config: Config = None
    ) -> Future[ForwardBackwardOutput]:
        future = self.right.forward(data, loss_fn, loss_fn_config)
        self.right.forward_backward(data, loss_fn, loss_fn_config).result()
        return future


@planted(
    "scores_match_the_reference",
    "OpenRLHF/OpenRLHF#634",
    "Log-probs have steps of hundredths of a nat, and KL estimates from them are noise.",
)
class ForwardInHalfPrecision(Relay):
    def forward(
        self, data: Any, loss_fn: Any = "cross_entropy", loss_fn_config: Config = None
    ) -> Future[ForwardBackwardOutput]:
        result = self.right.forward(data, loss_fn, loss_fn_config).result()
        scores = [output["logprobs"].to_torch() for output in result.loss_fn_outputs]
        outputs = [{"logprobs": TensorData(x.bfloat16().float())} for x in scores]
        return FinishedFuture(replace(result, loss_fn_outputs=outputs))


@planted(
    "scores_are_aligned",
    "NovaSky-AI/SkyRL#2048",
    "Chunks come back in the order of their arrival, so that log-probs belong to other datums.",
)
class RowsRotated(Relay):
    def forward(
        self, data: Any, loss_fn: Any = "cross_entropy", loss_fn_config: Config = None
    ) -> Future[ForwardBackwardOutput]:
        result = self.right.forward(data, loss_fn, loss_fn_config).result()
        outputs = [*result.loss_fn_outputs[1:], *result.loss_fn_outputs[:1]]
        return FinishedFuture(replace(result, loss_fn_outputs=outputs))


@planted(
    "candidates_are_scored",
    "services without [T, K] outputs",
    "Candidates are scored together, so that a distillation loss cannot weigh them.",
)
class CandidatesSummed(Relay):
    def forward(
        self, data: Any, loss_fn: Any = "cross_entropy", loss_fn_config: Config = None
    ) -> Future[ForwardBackwardOutput]:
        result = self.right.forward(data, loss_fn, loss_fn_config).result()
        scores = [output["logprobs"].to_torch() for output in result.loss_fn_outputs]
        summed = [TensorData(x.logsumexp(-1) if x.dim() == 2 else x) for x in scores]
        return FinishedFuture(replace(result, loss_fn_outputs=[{"logprobs": x} for x in summed]))


@planted(
    "forward_and_training_agree",
    "NovaSky-AI/SkyRL#2068",
    "forward and training compute log-probs in two ways, so that importance ratios are off from the first step.",
)
class TrainingInHalfPrecision(Relay):
    def forward_backward(self, data: Any, loss_fn: Any, loss_fn_config: Config = None) -> Future[ForwardBackwardOutput]:
        result = self.right.forward_backward(data, loss_fn, loss_fn_config).result()
        scores = [output["logprobs"].to_torch() for output in result.loss_fn_outputs]
        outputs = [{"logprobs": TensorData(x.bfloat16().float())} for x in scores]
        return FinishedFuture(replace(result, loss_fn_outputs=outputs))


@planted(
    "loss_values_match_the_definition",
    "NovaSky-AI/SkyRL#1893",
    "The reported loss is a mean where the gradient is that of a sum.",
)
class MeanReported(Relay):
    def forward_backward(self, data: Any, loss_fn: Any, loss_fn_config: Config = None) -> Future[ForwardBackwardOutput]:
        result = self.right.forward_backward(data, loss_fn, loss_fn_config).result()
        told = {**result.metrics, "loss:sum": result.metrics["loss:sum"] / len(data)}
        return FinishedFuture(replace(result, metrics=told))
