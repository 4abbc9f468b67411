"""Defects of backends in their state: checkpoints, seeds, samplers, order, retries, and other models on the same server."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, ClassVar, TypeVar
from weakref import WeakSet

from ....backends.fake.table import TableModel
from ....backends.operations.futures import FinishedFuture, Future
from ....backends.protocol import NormalizationMode, TrainerBackend
from ....backends.types import (
    AdamParams,
    ForwardBackwardOutput,
    OptimStepOutput,
    Rollout,
    SamplingParams,
    SaveStateOutput,
)
from ....datums.types import ModelInput
from ...under_test import closing
from .relay import Config, Relay, planted

T = TypeVar("T")


@planted(
    "checkpoints_hold_everything",
    "thinking-machines-lab/tinker-feedback#126",
    "A resumed run begins with cold moments, and says that it has resumed.",
)
class OptimizerNotLoaded(Relay):
    def load_state_with_optimizer(self, path: str) -> Future[None]:
        return self.right.load_state(path)


@planted(
    "checkpoints_hold_everything",
    "NovaSky-AI/SkyRL#2071",
    "Loading weights alone goes on with the moments of the run before.",
)
class MomentsKeptBeyondALoad(Relay):
    def load_state(self, path: str) -> Future[None]:
        warm = self.model
        future = self.right.load_state(path)
        self.engine.model = TableModel(self.model.logits, warm.first, warm.second, warm.steps)
        return future


@planted(
    "checkpoints_restore_log_probs",
    "servers that export adapters in bfloat16",
    "The loaded model is not the one that was saved.",
)
class SavedInHalfPrecision(Relay):
    def save_state(self, name: str) -> Future[SaveStateOutput]:
        future = self.right.save_state(name)
        saved = self.engine.saved[name]["model"]
        saved.logits = saved.logits.bfloat16().double()
        return future


@planted(
    "seeds_determine_initial_weights",
    "GMISWE/tinker-cloud#38",
    "No run can be repeated, though every request carries its seed.",
)
class SeedIgnored(Relay):
    drawn: ClassVar[Iterator[int]] = itertools.count(1)

    @classmethod
    def seeded(cls, seed: int) -> Relay:
        return cls(next(cls.drawn))


@planted(
    "sampling_seeds_repeat",
    "GMISWE/tinker-cloud#38",
    "Samples cannot be drawn again.",
)
class SampleSeedIgnored(Relay):
    def sample(self, prompts: Sequence[ModelInput], n: int, params: SamplingParams) -> Future[list[Rollout]]:
        return self.right.sample(prompts, n, replace(params, seed=None))


@planted(
    "samples_carry_the_policys_log_probs",
    "thinking-machines-lab/tinker-feedback#148",
    "Sampled log-probs are those of another distribution than the trainer's, so that every ratio is wrong.",
)
class TemperedLogProbs(Relay):
    def sample(self, prompts: Sequence[ModelInput], n: int, params: SamplingParams) -> Future[list[Rollout]]:
        rollouts = self.right.sample(prompts, n, params).result()
        return FinishedFuture([replace(r, logprobs=r.sampler_logprobs or []) for r in rollouts])


@planted(
    "samples_carry_the_policys_log_probs",
    "samplers that are synchronised now and then, and do not say so",
    "Rollouts come from an older policy than their log-probs claim.",
)
class SamplerOnOldWeights(Relay):
    def sample(self, prompts: Sequence[ModelInput], n: int, params: SamplingParams) -> Future[list[Rollout]]:
        return Relay().sample(prompts, n, params)


@planted(
    "close_reports_failures",
    "clients that close quietly",
    "A failure whose future was never read is never heard of.",
)
class ErrorsSwallowed(Relay):
    def close(self) -> None:
        with suppress(Exception):
            self.right.close()


@planted(
    "models_are_isolated",
    "NovaSky-AI/SkyRL#454",
    "Another client's gradient is part of the step.",
)
class GradientsShared(Relay):
    served: ClassVar[WeakSet[GradientsShared]] = WeakSet()

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.served.add(self)

    def optim_step(
        self, params: AdamParams, grad_accumulation_normalization: NormalizationMode = None
    ) -> Future[OptimStepOutput]:
        if self.engine.gradient is not None:
            waiting = [one.gradient for one in self.served if one is not self]
            self.engine.gradient = sum(waiting, self.engine.gradient)
        return self.right.optim_step(params, grad_accumulation_normalization)


@planted(
    "models_are_isolated",
    "NovaSky-AI/SkyRL#1051, between clients",
    "Another client's clip range is used.",
)
class ConfigsShared(Relay):
    kept: ClassVar[dict[str, Config]] = {}

    def forward_backward(self, data: Any, loss_fn: Any, loss_fn_config: Config = None) -> Future[ForwardBackwardOutput]:
        config = self.kept.setdefault(loss_fn, loss_fn_config) if loss_fn == "ppo" else loss_fn_config
        return self.right.forward_backward(data, loss_fn, config)

    def close(self) -> None:
        self.kept.clear()
        self.right.close()


class LazyFuture(Future[T]):
    """The result of an operation that begins when somebody waits for it."""

    def __init__(self, begin: Callable[[], Future[T]]) -> None:
        self._begin, self._begun = begin, list[Future[T]]()

    def _future(self) -> Future[T]:
        if not self._begun:
            self._begun.append(self._begin())
        return self._begun[0]

    def result(self, timeout: float | None = None) -> T:
        return self._future().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        return self._future().exception(timeout)

    def done(self) -> bool:
        return bool(self._begun)

    def __await__(self) -> Generator[Any, None, T]:
        return self._future().__await__()


@planted(
    "operations_keep_their_order",
    "NovaSky-AI/SkyRL#1489",
    "With two steps queued the second one runs before its gradient.",
)
class StepsOvertake(Relay):
    def forward_backward(self, data: Any, loss_fn: Any, loss_fn_config: Config = None) -> Future[ForwardBackwardOutput]:
        return LazyFuture(lambda: self.right.forward_backward(data, loss_fn, loss_fn_config))


@planted(
    "retries_apply_once",
    "NovaSky-AI/SkyRL#2035",
    "A request that is sent again because its answer was lost is added twice.",
)
class RetriesRunAgain(Relay):
    resent = False

    @classmethod
    @contextmanager
    def unreliable(cls) -> Iterator[TrainerBackend]:
        with closing(cls()) as backend:
            backend.resent = True
            yield backend

    def forward_backward(self, data: Any, loss_fn: Any, loss_fn_config: Config = None) -> Future[ForwardBackwardOutput]:
        future = self.right.forward_backward(data, loss_fn, loss_fn_config)
        return self.right.forward_backward(data, loss_fn, loss_fn_config) if self.resent else future
