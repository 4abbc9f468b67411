"""Defects of backends in what is trained: data, weights, losses by name, and what adds up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ....backends.operations.futures import FinishedFuture, Future
from ....backends.protocol import CustomLoss
from ....backends.types import ForwardBackwardOutput
from ....datums.types import Datum
from ....losses import get_loss
from ...conformance.actions import as_function
from .relay import Config, EditedCalls, Relay, planted


@planted(
    "negative_weights_are_kept",
    "services that take weights for a mask",
    "Custom losses, whose cotangents travel as weights of both signs, train only the tokens that they push up.",
)
class NegativeWeightsClamped(EditedCalls):
    def edited_weights(self, weights: Tensor) -> Tensor:
        return weights.clamp(min=0)


@planted(
    "fractional_weights_scale_gradients",
    "services that read weights as an integer mask",
    "Weights below 1 become 0, so that soft labels and averaged losses do not train at all.",
)
class WeightsAsIntegers(EditedCalls):
    def edited_weights(self, weights: Tensor) -> Tensor:
        return weights.long().float()


@planted(
    "fractional_weights_scale_gradients",
    "hatchery-core 0.3.0, its cross-entropy",
    "The protocol's sum is a weighted mean, so that a custom loss is right only while its weights add up to at most 1.",
)
class WeightedMean(EditedCalls):
    losses = ("cross_entropy",)

    def edited_data(self, data: list[Datum]) -> list[Datum]:
        total = sum(float(d.loss_fn_inputs["weights"].to_torch().sum()) for d in data)
        return [d.with_inputs(weights=d.loss_fn_inputs["weights"].to_torch() / max(total, 1.0)) for d in data]


@planted(
    "raw_sums_add_up",
    "NovaSky-AI/SkyRL#1504",
    "Each call is divided by its own count, so that the update depends on how a batch is cut.",
)
class MeanOfEachCall(EditedCalls):
    def edited_data(self, data: list[Datum]) -> list[Datum]:
        trained = sum(int((d.loss_fn_inputs["weights"].to_torch() != 0).sum()) for d in data)
        return [d.with_inputs(weights=d.loss_fn_inputs["weights"].to_torch() / max(trained, 1)) for d in data]


@planted(
    "calls_add_up",
    "rllm-org/rllm#782",
    "A mean loss is divided by the count of its chunk, so that the size of the chunks is part of the objective.",
)
class MeanOfMeans(Relay):
    def forward_backward(self, data: Any, loss_fn: Any, loss_fn_config: Config = None) -> Future[ForwardBackwardOutput]:
        if loss_fn not in ("grpo", "orpo"):
            return self.right.forward_backward(data, loss_fn, loss_fn_config)
        return self.right.forward_backward_custom(data, as_function(get_loss(loss_fn, loss_fn_config)))


@planted(
    "zero_weights_change_nothing",
    "NVIDIA-NeMo/Automodel#3796",
    "A batch without a trained token is 0/0, and the NaN goes into the weights or the log.",
)
class MeanOverNothing(Relay):
    def forward_backward(self, data: Any, loss_fn: Any, loss_fn_config: Config = None) -> Future[ForwardBackwardOutput]:
        future = self.right.forward_backward(data, loss_fn, loss_fn_config)
        if future.exception() is not None or any(d.loss_fn_inputs["weights"].to_torch().any() for d in data):
            return future
        result = future.result()
        return FinishedFuture(replace(result, metrics={**result.metrics, "loss:sum": float("nan")}))


@planted(
    "every_token_counts",
    "fw-ai/cookbook#388",
    "The first response token is never trained; pairs that differ there have a margin of 0 and no gradient.",
)
class FirstTokenDropped(EditedCalls):
    def edited_weights(self, weights: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(weights[:1]), weights[1:]])


@planted(
    "every_token_counts",
    "verl-project/verl#3562",
    "The end-of-text token is never trained, and the model does not stop talking.",
)
class LastTokenDropped(EditedCalls):
    def edited_weights(self, weights: Tensor) -> Tensor:
        return torch.cat([weights[:-1], torch.zeros_like(weights[:1])])


@planted(
    "candidates_train_like_single_targets",
    "services that flatten soft targets",
    "Distillation on top-k targets becomes training on the first of them.",
)
class FirstCandidateOnly(EditedCalls):
    def edited_weights(self, weights: Tensor) -> Tensor:
        return weights if weights.dim() == 1 else weights * torch.eye(weights.shape[-1])[0]


@planted(
    "masked_inputs_are_ignored",
    "services of the plain protocol, given weights",
    "Masked tokens, such as tool output, are trained by their junk advantages.",
)
class WeightsIgnored(EditedCalls):
    losses = ("importance_sampling", "ppo")

    def edited_weights(self, weights: Tensor) -> Tensor:
        return torch.ones_like(weights)


@planted(
    "named_losses_match_their_definitions",
    "NovaSky-AI/SkyRL#1053",
    "Every request trains cross-entropy, whatever loss it names.",
)
class NameIgnored(EditedCalls):
    def edited_loss(self, loss: str, config: Config) -> tuple[str, Config]:
        return "cross_entropy", None


@planted(
    "named_losses_match_their_definitions",
    "NovaSky-AI/SkyRL#1159",
    "Clip ranges are spelt otherwise than the server reads them, so the defaults are used.",
)
class ConfigIgnored(EditedCalls):
    losses = ("ppo",)

    def edited_loss(self, loss: str, config: Config) -> tuple[str, Config]:
        return loss, None


@planted(
    "configs_are_per_request",
    "NovaSky-AI/SkyRL#1051",
    "The requests of a batch are all trained with the config of the first one.",
)
class FirstConfigKept(EditedCalls):
    losses = ("ppo",)

    def edited_loss(self, loss: str, config: Config) -> tuple[str, Config]:
        if not self.right._accumulation.ledger.entries:
            self.kept = config
        return loss, self.kept


@planted(
    "mistakes_are_refused",
    "NovaSky-AI/SkyRL#644",
    "A misspelt hyperparameter does nothing, and nobody says so.",
)
class UnknownKeysIgnored(Relay):
    def forward_backward(self, data: Any, loss_fn: Any, loss_fn_config: Config = None) -> Future[ForwardBackwardOutput]:
        known = {key: value for key, value in (loss_fn_config or {}).items() if key != "btea"}
        return self.right.forward_backward(data, loss_fn, known or None)


@planted(
    "gradients_match_the_loss",
    "Arctic-Platform#110, as a negative control",
    "Training makes its targets less likely.",
)
class SignLost(Relay):
    def forward_backward(self, data: Any, loss_fn: Any, loss_fn_config: Config = None) -> Future[ForwardBackwardOutput]:
        before = self.gradient
        future = self.right.forward_backward(data, loss_fn, loss_fn_config)
        if self.engine.gradient is not None:
            self.engine.gradient = 2 * before - self.engine.gradient
        return future


@planted(
    "updates_match_the_reference",
    "adapters whose target modules miss a layer of a new architecture",
    "A part of the model is never trained, and everything else goes well.",
)
class RowsFrozen(Relay):
    def forward_backward(self, data: Any, loss_fn: Any, loss_fn_config: Config = None) -> Future[ForwardBackwardOutput]:
        future = self.right.forward_backward(data, loss_fn, loss_fn_config)
        if self.engine.gradient is not None:
            self.engine.gradient[::3] = 0.0
        return future


@planted(
    "raw_sums_add_up",
    "NovaSky-AI/SkyRL#2008",
    "Gradients are cleared with every request, so that only the last chunk of a call counts.",
)
class LastCallOnly(Relay):
    def forward_backward(self, data: Any, loss_fn: Any, loss_fn_config: Config = None) -> Future[ForwardBackwardOutput]:
        if self.engine.gradient is not None:
            self.engine.gradient = torch.zeros_like(self.engine.gradient)
        return self.right.forward_backward(data, loss_fn, loss_fn_config)


@planted(
    "bad_datums_add_nothing",
    "servers that add datum by datum",
    "A refused request has trained the datums before the bad one, and its repair trains them again.",
)
class HalfABatchApplied(Relay):
    def forward_backward(self, data: Any, loss_fn: Any, loss_fn_config: Config = None) -> Future[ForwardBackwardOutput]:
        future = self.right.forward_backward(data, loss_fn, loss_fn_config)
        if loss_fn == "cross_entropy" and future.exception() is not None:
            for datum in data:
                self.right.forward_backward([datum], loss_fn, loss_fn_config).exception()
        return future


@planted(
    "failed_calls_block_the_step",
    "training loops that never read their futures",
    "A step is made without the batch that failed, and the run looks well.",
)
class FailuresForgotten(Relay):
    def forward_backward(self, data: Any, loss_fn: Any, loss_fn_config: Config = None) -> Future[ForwardBackwardOutput]:
        future = self.right.forward_backward(data, loss_fn, loss_fn_config)
        future.exception()  # as if somebody had asked for it
        return future


@planted(
    "functions_match_registered_losses",
    "services with a second code path for custom losses",
    "A custom loss trains at twice the rate of the built-in loss that it computes.",
)
class CustomDoubled(Relay):
    def forward_backward_custom(self, data: Sequence[Datum], loss_fn: CustomLoss) -> Future[ForwardBackwardOutput]:
        def doubled(data: Sequence[Any], logprobs: list[Tensor]) -> tuple[Tensor, Any]:
            loss, metrics = loss_fn(data, logprobs)
            return 2 * loss, metrics

        return self.right.forward_backward_custom(data, doubled)


@planted(
    "cotangents_arrive_as_they_are",
    "services that carry weights in bfloat16",
    "The cotangents of a custom loss lose all but eight bits.",
)
class CotangentsRounded(Relay):
    def forward_backward_custom(self, data: Sequence[Datum], loss_fn: CustomLoss) -> Future[ForwardBackwardOutput]:
        def rounded(data: Sequence[Any], logprobs: list[Tensor]) -> tuple[Tensor, Any]:
            loss, metrics = loss_fn(data, logprobs)
            cotangents = torch.autograd.grad(loss, logprobs)
            terms = [(c.bfloat16().to(c.dtype) * x).sum() for c, x in zip(cotangents, logprobs, strict=True)]
            return torch.stack(terms).sum(), metrics

        return self.right.forward_backward_custom(data, rounded)
