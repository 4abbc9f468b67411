"""The four objectives: what one step does, and what is measured on the held-out set, by the backend protocol alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, islice
from typing import TypeVar, final

import torch

from ...backends import AdamParams, Rollout, SamplingParams, with_reference
from ...backends.protocol import PolicyBackend
from ...datums import Datum, ModelInput, datum_from_rollout
from ...errors import ConfigError
from ...losses import DPO, GRPO, KL, ORPO, Loss, functional, group_advantages, recipe
from .data import DemoData, Question
from .models import DemoModel
from .tasks import Split

__all__ = ["Objective", "objectives"]

T = TypeVar("T")
_WARM_UP = 4


class Objective(ABC):
    """One training objective of the demo.

    Attributes:
        name, title: short and long.
        measure, unit: the held-out figure that must improve.
        training: the metric of a step that is the same figure on the batch that the step trains.
        better: +1 if it should rise, -1 if it should fall.
        steps: fewest and most.
        share: of the demo's time.
    """

    name: str
    title: str
    measure: str
    training: str
    unit: str
    better: int
    steps: tuple[int, int]
    share: float
    learning_rate: float

    @abstractmethod
    def step(self, backend: PolicyBackend, params: AdamParams) -> Mapping[str, float]:
        """Take one optimizer step on the next batch."""

    @abstractmethod
    def evaluate(self, backend: PolicyBackend) -> dict[str, float]:
        """Measure the held-out set."""

    def prepare(self, backend: PolicyBackend) -> None:  # noqa: B027  # most objectives need nothing
        """Compute on the base weights, once, what all steps and evaluations need."""

    def params(self, step: int, steps: int) -> AdamParams:
        """Return the parameters of a step: the learning rate warms up, then falls linearly to a tenth."""
        warm_up = min(1.0, (step + 1) / _WARM_UP)
        decay = 1.0 - 0.9 * max(0, step - _WARM_UP) / max(1, steps - _WARM_UP)
        return AdamParams(self.learning_rate * min(warm_up, decay), 0.9, 0.99, 1e-8, 0.0, 1.0)


def batches(items: Sequence[T], size: int) -> Iterator[list[T]]:
    """Yield batches in order, starting again at the end; of fewer items all, as none may stand in a batch twice."""
    endless = cycle(items)
    while True:
        yield list(islice(endless, min(size, len(items))))


@final
class Sft(Objective):
    """Supervised fine-tuning."""

    name, title, measure, unit, better = "sft", "SFT: cross-entropy", "nll", "NLL, nats per token", -1
    training = "nll:mean"
    steps, share = (8, 30), 0.2

    def __init__(self, model: DemoModel, data: Split[Datum]) -> None:
        self.learning_rate = 2e-3 * model.learning_rate
        self._loss, self._normalization = recipe("sft")
        self._held_out = data.held_out
        self._batches = batches(data.train, 8)

    def step(self, backend: PolicyBackend, params: AdamParams) -> Mapping[str, float]:
        result = backend.forward_backward(next(self._batches), self._loss).result()
        backend.optim_step(params, self._normalization).result()
        return result.metrics

    def evaluate(self, backend: PolicyBackend) -> dict[str, float]:
        return {"nll": backend.forward(self._held_out).result().metrics["nll:mean"]}


@final
class Preference(Objective):
    """DPO or ORPO on pairs of answers. The reference scores each pair once, before training."""

    measure, training, unit, better = "margin", "margin:mean", "margin", 1

    def __init__(self, model: DemoModel, data: Split[Datum], name: str) -> None:
        self.name = name
        self.title = {"dpo": "DPO: beta = 0.1", "orpo": "ORPO: lambda = 0.5"}[name]
        self.steps, self.share = {"dpo": ((8, 24), 0.17), "orpo": ((8, 24), 0.13)}[name]
        self.learning_rate = {"dpo": 1e-3, "orpo": 2e-3}[name] * model.learning_rate
        self._loss: Loss = DPO(0.1) if name == "dpo" else ORPO(0.5)
        self._held_out, self._train = data.held_out, data.train
        self._batches = batches(self._train, 16)

    def step(self, backend: PolicyBackend, params: AdamParams) -> Mapping[str, float]:
        result = backend.forward_backward(next(self._batches), self._loss).result()
        backend.optim_step(params, recipe(self.name).normalization).result()
        return result.metrics

    def evaluate(self, backend: PolicyBackend) -> dict[str, float]:
        metrics = backend.forward(self._held_out, self._loss).result().metrics
        return {"margin": metrics["margin:mean"], "accuracy": metrics["accuracy:mean"]}

    def prepare(self, backend: PolicyBackend) -> None:
        """Let the reference score every pair once."""
        if "ref_logprobs" in self._loss.required_inputs:
            scored = with_reference([*self._held_out, *self._train], backend.reference())
            self._held_out, self._train = scored[: len(self._held_out)], scored[len(self._held_out) :]
        self._batches = batches(self._train, 16)


@final
class Rl(Objective):
    """GRPO with a KL penalty on questions whose answers can be verified."""

    name, title, measure, unit, better = "grpo", "GRPO: KL beta = 0.04", "reward", "mean reward", 1
    training = "reward"
    steps, share = (8, 30), 0.5
    prompts_per_step, samples = 4, 8

    def __init__(self, model: DemoModel, data: Split[Question], max_new_tokens: int, seed: int) -> None:
        self.learning_rate = 1e-3 * model.learning_rate
        self._model, self._max_new_tokens, self._seed, self._steps_taken = model, max_new_tokens, seed, 0
        self._loss, self._normalization = GRPO(kl=KL("k3", 0.04), aggregation="sum"), recipe("grpo").normalization
        self._held_out = data.held_out
        self._batches = batches(data.train, self.prompts_per_step)

    def params(self, step: int, steps: int) -> AdamParams:
        """Return the parameters of a step: the learning rate warms up, then stays constant."""
        return AdamParams(self.learning_rate * min(1.0, (step + 1) / 3), 0.9, 0.99, 1e-8, 0.0, 1.0)

    def step(self, backend: PolicyBackend, params: AdamParams) -> Mapping[str, float]:
        questions = next(self._batches)
        self._steps_taken += 1
        rollouts, rewards = self._sample(backend, questions, self.samples, self._seed + self._steps_taken)
        groups = torch.tensor([r.prompt_index for r in rollouts])
        advantages = group_advantages(torch.tensor(rewards), groups).advantages
        data = with_reference(self._datums(questions, rollouts, advantages.tolist()), backend.reference())
        result = backend.forward_backward(data, self._loss).result()
        backend.optim_step(params, self._normalization).result()
        return {**result.metrics, "reward": sum(rewards) / len(rewards)}

    def evaluate(self, backend: PolicyBackend) -> dict[str, float]:
        rollouts, rewards = self._sample(backend, self._held_out, 4, self._seed)
        data = with_reference(self._datums(self._held_out, rollouts, [0.0] * len(rollouts)), backend.reference())
        per_token, per_sequence = [], []
        for datum in data:
            inputs = datum.loss_fn_inputs
            trained = inputs["weights"].to_torch() != 0
            shift = (inputs["logprobs"].to_torch() - inputs["ref_logprobs"].to_torch())[trained]
            per_token.append(float(functional.kl(shift, 0.0).mean()))
            per_sequence.append(float(shift.sum()))
        count = len(rollouts)
        return {
            "reward": sum(rewards) / count,
            "correct": sum(r == 1.0 for r in rewards) / count,
            "kl_per_token": sum(per_token) / count,
            "kl_per_answer": sum(per_sequence) / count,
        }

    def _sample(
        self, backend: PolicyBackend, questions: Sequence[Question], samples: int, seed: int
    ) -> tuple[list[Rollout], list[float]]:
        model = self._model
        prompts = [ModelInput.from_ints(q.prompt) for q in questions]
        params = SamplingParams(self._max_new_tokens, stop=model.encode(model.end), seed=seed)
        rollouts = backend.sample(prompts, samples, params).result()
        rewards = []
        for r in rollouts:
            ended = r.stop_reason == "stop"
            text = model.decode(r.tokens[:-1] if ended else r.tokens)
            rewards.append(questions[r.prompt_index].reward(text, ended))
        return rollouts, rewards

    def _datums(
        self, questions: Sequence[Question], rollouts: Sequence[Rollout], advantages: Sequence[float]
    ) -> list[Datum]:
        return [
            datum_from_rollout(
                questions[r.prompt_index].prompt,
                r.tokens,
                r.logprobs,
                a,
                group_id=r.prompt_index,
                weights_version=r.weights_version,
            )
            for r, a in zip(rollouts, advantages, strict=True)
        ]


def objectives(model: DemoModel, data: DemoData, seed: int, names: Sequence[str]) -> list[Objective]:
    """Return fresh objectives of these names.

    Raises:
        ConfigError: there is no data for one.
    """
    if missing := sorted(set(names) - set(data.names)):
        raise ConfigError(f"there is no data for {', '.join(missing)}, only for {', '.join(data.names)}")
    made: list[Objective] = []
    for name in names:
        if name == "sft" and data.supervised is not None:
            made.append(Sft(model, data.supervised))
        elif name == "grpo" and data.questions is not None:
            made.append(Rl(model, data.questions, data.max_new_tokens, seed))
        elif data.pairs is not None:
            made.append(Preference(model, data.pairs, name))
    return made
