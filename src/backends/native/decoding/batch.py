"""Continuous batching: requests of any number of callers on one model, and on its adapters, are decoded together."""

from __future__ import annotations

from dataclasses import replace
from typing import Final, final
from weakref import WeakSet

import torch

from ....datums.types import ModelInput
from ....errors import BackendError
from ...sampling import check_prompts
from ...types import SamplingParams
from ..causal_lm import CausalLM
from ..models.facts.model_facts import ModelFacts
from ..models.hf import HFModel
from . import agreement
from .cached import CachedDecoder
from .decoders import PlainDecoder
from .lane import Lane, LaneLimits
from .requests import Ends, GenerationRequest

__all__ = ["ContinuousBatch", "facts_of"]

_PLAIN_ROWS: Final = 8  # each is run alone: more at once would make a step longer, and nothing faster


def facts_of(model: CausalLM) -> ModelFacts:
    """Return what is known of a model's lengths."""
    facts = getattr(model, "facts", None)
    return facts if isinstance(facts, ModelFacts) else ModelFacts()


@final
class ContinuousBatch:
    """Decodes requests together, one token of each completion a step; completions enter and leave at any step.

    What is sampled depends on the prompt, the parameters and the seed only, up to the rounding of the model's forward.

    Args:
        model: the weights, which must not change.
        limits: what is decoded at once.

    Requests on adapters of the model may be among the others, see `accepts`: each row has its own adapter.

    Attributes:
        steps: that were done.
    """

    def __init__(self, model: CausalLM, limits: LaneLimits | None = None) -> None:
        self._model, self._limits = model, limits or LaneLimits()
        self._cached: Lane | None = None
        self._plain: Lane | None = None
        self._adapted: WeakSet[CausalLM] = WeakSet()
        self.steps = 0

    @property
    def alive(self) -> int:
        """Completions that are being decoded."""
        return sum(lane.alive for lane in self._lanes())

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return any(lane.busy for lane in self._lanes())

    def accepts(self, model: CausalLM) -> bool:
        """Return whether it gives a model's requests what that model itself gives: its own, or an adapter of it."""
        own = self._model
        if model is not own and model not in self._adapted:
            if not (isinstance(own, HFModel) and isinstance(model, HFModel) and agreement.adapter_agrees(own, model)):
                return False
            self._adapted.add(model)
        return True

    def add(
        self,
        prompt: ModelInput,
        n: int,
        params: SamplingParams,
        seed: int,
        *,
        ends: Ends | None = None,
        owner: str = "",
        model: CausalLM | None = None,
    ) -> GenerationRequest:
        """Accept a request; its completions begin at the next steps.

        Args:
            prompt: what is completed.
            n: how many completions.
            params: how they are sampled; its seed is not read.
            seed: what their random numbers follow from.
            ends: says of a completion's tokens whether they end it, beside the stop tokens.
            owner: owners share the batch fairly.
            model: one that it accepts; None: the batch's own.

        Raises:
            BackendError: the model is not accepted.
            InvalidDatumsError: the prompt is empty, has tokens outside the vocabulary, or leaves the model's context.
        """
        if model is not None and not self.accepts(model):
            raise BackendError("this batch decodes for one model and adapters of it, and this is neither")
        vocab, facts = self._model.head().weight.shape[0], facts_of(self._model)
        check_prompts([prompt], n, vocab, facts.max_length, params.max_tokens)
        stop = params.stop if params.stop is not None else getattr(self._model, "eos_token_ids", ())
        whose = self._model if model is None else model
        request = GenerationRequest(whose, prompt.tokens, n, params, seed, frozenset(stop), ends, owner)
        self._lane(len(prompt) + params.max_tokens).add(request)
        return request

    def advance(self) -> None:
        """Give every completion for which there is a place one more token.

        What the model raises is the error of the requests that it concerns.
        """
        self.steps += 1
        with torch.no_grad():
            for lane in self._lanes():
                lane.step()

    def cancel(self, request: GenerationRequest) -> None:
        """Let go of a request; nothing happens if it is done."""
        request.fail(BackendError("it was cancelled"))
        for lane in self._lanes():
            lane.tidy()

    def _lanes(self) -> list[Lane]:
        return [lane for lane in (self._cached, self._plain) if lane is not None]

    def _lane(self, longest: int) -> Lane:
        """Return the rows with a cache, where one gives what the model's own forward gives up to this length."""
        model = self._model
        if isinstance(model, HFModel):
            # A text that grows beyond them has other keys from its first token on.
            changes = [n for n in (model.facts.longrope, model.facts.dynamic_rope) if n is not None]
            if all(longest <= n for n in changes) and agreement.cache_agrees(model):
                self._cached = self._cached or Lane(CachedDecoder(model), self._limits)
                return self._cached
        limits = replace(self._limits, rows=min(_PLAIN_ROWS, self._limits.rows))
        self._plain = self._plain or Lane(PlainDecoder(), limits)
        return self._plain
