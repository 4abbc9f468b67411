"""Defects of backends in the step: AdamW, clipping, normalisation, and what is left of a gradient."""

from __future__ import annotations

from dataclasses import replace

import torch

from ....backends.operations.futures import Future
from ....backends.protocol import NormalizationMode
from ....backends.types import AdamParams, OptimStepOutput
from ....errors import DoubleNormalizationError
from .relay import Relay, planted

Mode = NormalizationMode
Stepped = Future[OptimStepOutput]


class EditedSteps(Relay):
    """A backend that changes the hyperparameters of a step."""

    def optim_step(self, params: AdamParams, grad_accumulation_normalization: Mode = None) -> Stepped:
        return self.right.optim_step(self.edited(params), grad_accumulation_normalization)

    def edited(self, params: AdamParams) -> AdamParams:
        return params


@planted(
    "steps_match_adamw",
    "optimizers written anew",
    "The first steps are less than half as long as they should be at the usual betas.",
)
class BiasCorrectionMissing(EditedSteps):
    def edited(self, params: AdamParams) -> AdamParams:
        steps = self.model.steps + 1
        first, root = 1 - params.beta1**steps, (1 - params.beta2**steps) ** 0.5
        return replace(params, learning_rate=params.learning_rate * first / root, eps=params.eps / root)


@planted(
    "hyperparameters_are_of_each_step",
    "servers that make their optimizer once",
    "Hyperparameters that come with each step are those of the first step for ever.",
)
class FirstBetasKept(EditedSteps):
    betas: dict[str, float] | None = None

    def edited(self, params: AdamParams) -> AdamParams:
        self.betas = self.betas or {"beta1": params.beta1, "beta2": params.beta2}
        return replace(params, **self.betas)


@planted(
    "epsilon_stands_beside_the_root",
    "optimizers written anew",
    "An eps that was chosen to damp small gradients damps by its square root.",
)
class EpsilonUnderTheRoot(EditedSteps):
    def optim_step(self, params: AdamParams, grad_accumulation_normalization: Mode = None) -> Stepped:
        before = self.model.logits
        future = self.right.optim_step(params, grad_accumulation_normalization)
        if future.result().stepped:
            first = self.model.first / (1 - params.beta1**self.model.steps)
            second = self.model.second / (1 - params.beta2**self.model.steps)
            kept = before * (1 - params.learning_rate * params.weight_decay)
            self.model.logits = kept - params.learning_rate * first / (second + params.eps).sqrt()
        return future


@planted(
    "decay_is_decoupled",
    "servers that read the learning rate alone",
    "Weight decay has no effect.",
)
class DecayIgnored(EditedSteps):
    def edited(self, params: AdamParams) -> AdamParams:
        return replace(params, weight_decay=0.0)


@planted(
    "decay_is_decoupled",
    "optimizers written after the paper's first algorithm",
    "Weights decay by the decay itself, a thousand times too fast at the usual rates.",
)
class DecayWithoutTheRate(EditedSteps):
    def edited(self, params: AdamParams) -> AdamParams:
        return replace(params, weight_decay=params.weight_decay / params.learning_rate)


@planted(
    "decay_is_decoupled",
    "optimizers that are Adam with L2, under the name of AdamW",
    "Decay is divided by the root of the second moment, and large gradients hide it.",
)
class DecayCoupled(EditedSteps):
    def edited(self, params: AdamParams) -> AdamParams:
        if self.engine.gradient is not None:
            self.engine.gradient = self.engine.gradient + params.weight_decay * self.model.logits
        return replace(params, weight_decay=0.0)


@planted(
    "gradients_are_clipped_by_their_norm",
    "fw-ai/cookbook#328",
    "A step that should have been clipped makes the weights infinite.",
)
class ClippingIgnored(EditedSteps):
    def edited(self, params: AdamParams) -> AdamParams:
        return replace(params, grad_clip_norm=0.0)


@planted(
    "gradients_are_clipped_by_their_norm",
    "servers that clip values for norms",
    "The direction of the gradient changes.",
)
class ClippedByElement(EditedSteps):
    def edited(self, params: AdamParams) -> AdamParams:
        if self.engine.gradient is not None and params.grad_clip_norm:
            self.engine.gradient = self.engine.gradient.clamp(-params.grad_clip_norm, params.grad_clip_norm)
        return replace(params, grad_clip_norm=0.0)


@planted(
    "clipping_follows_normalization",
    "trainers that clip the accumulated sum",
    "The larger the batch, the smaller the step.",
)
class ClippedBeforeTheDivision(EditedSteps):
    def edited(self, params: AdamParams) -> AdamParams:
        if self.engine.gradient is not None and params.grad_clip_norm:
            shrink = params.grad_clip_norm / float(self.engine.gradient.norm())
            self.engine.gradient = min(shrink, 1.0) * self.engine.gradient
        return replace(params, grad_clip_norm=0.0)


@planted(
    "one_normalizer",
    "rllm-org/rllm#781",
    "A raw sum is trained where a mean was asked for, at thousands of times the rate.",
)
class ModeIgnored(Relay):
    def optim_step(self, params: AdamParams, grad_accumulation_normalization: Mode = None) -> Stepped:
        ledger = self.right._accumulation.ledger
        if None in ledger.declared and grad_accumulation_normalization is not None:
            raise DoubleNormalizationError("a mean would be divided a second time")
        return self.right.optim_step(params)


@planted(
    "one_normalizer",
    "fw-ai/cookbook#223",
    "A loss that is a mean is divided by the tokens once more, so that gradients shrink with their square.",
)
class DividedTwice(Relay):
    def optim_step(self, params: AdamParams, grad_accumulation_normalization: Mode = None) -> Stepped:
        ledger = self.right._accumulation.ledger
        if None in ledger.declared and grad_accumulation_normalization == "num_loss_tokens":
            self.engine.gradient = self.gradient / max(ledger.tokens, 1)
            return self.right.optim_step(params)
        return self.right.optim_step(params, grad_accumulation_normalization)


@planted(
    "empty_steps_change_nothing",
    "optimizers that step whenever they are told to",
    "An empty step moves the weights along old gradients.",
)
class StepsOnMomentum(Relay):
    def optim_step(self, params: AdamParams, grad_accumulation_normalization: Mode = None) -> Stepped:
        future = self.right.optim_step(params, grad_accumulation_normalization)
        if not future.result().stepped:
            self.model.adamw(torch.zeros_like(self.model.logits), params)
        return future


@planted(
    "steps_clear_gradients",
    "trainers that forget zero_grad",
    "Every step repeats all gradients before it.",
)
class GradientKeptAfterTheStep(Relay):
    def optim_step(self, params: AdamParams, grad_accumulation_normalization: Mode = None) -> Stepped:
        kept = self.engine.gradient
        future = self.right.optim_step(params, grad_accumulation_normalization)
        self.engine.gradient = kept
        return future


@planted(
    "discarded_gradients_are_gone",
    "services that cannot discard, and do not say so",
    "A batch that was given up is trained by the next step.",
)
class DiscardIgnored(Relay):
    def discard_gradients(self) -> None:
        kept = self.engine.gradient
        self.right.discard_gradients()
        self.engine.gradient = kept
