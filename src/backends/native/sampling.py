"""Sampling: prompts once, then one token a step for every unfinished completion."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ...datums.types import ModelInput
from ...errors import require_extra
from ...ops.logprobs import head_logits
from ..sampling import check_prompts, choose_tokens
from ..types import Rollout, SamplingParams
from .causal_lm import CausalLM
from .execution.forward import model_device
from .models.facts.model_facts import ModelFacts
from .models.facts.probes import probe_sequences
from .models.facts.probing import in_float32
from .models.hf import HFModel

__all__ = ["Ends", "cache_agrees", "draw"]

_logger = logging.getLogger(__name__)
_MAX_ROWS = 128
_TOLERANCE: Final = 1e-3  # of logits, relative
_HALF_TOLERANCE: Final = 1e-2  # where the head itself rounds to half precision
_PROBED: Final = 64  # tokens of a window up to which sampling is tried beyond it
_agrees: WeakKeyDictionary[HFModel, bool] = WeakKeyDictionary()  # what was found, by model
Ends = Callable[[Sequence[int]], bool]


class Decoder(Protocol):
    """Keeps the state of a set of rows; every method returns or concerns the unfinished rows in order."""

    def start(self, prompts: Sequence[Tensor], n: int) -> Tensor:
        """Read the prompts, copy each n times, and return the next-token logits, [P * n, V]."""
        ...

    def step(self, tokens: Tensor, keep: Tensor) -> Tensor:
        """Drop all rows but ``keep`` (int64 indices), append ``tokens`` to these, and return their logits."""
        ...


def draw(
    model: CausalLM,
    prompts: Sequence[ModelInput],
    n: int,
    params: SamplingParams,
    generator: torch.Generator,
    version: int,
    ends: Ends | None = None,
) -> list[Rollout]:
    """Draw ``n`` completions of each prompt, prompt-major; one for which ``ends`` says so stops too.

    With a seed, each prompt has a generator of its own.

    Raises:
        InvalidDatumsError: a prompt is empty, has tokens outside the vocabulary, or leaves the model's context.
    """
    vocab, context = model.head().weight.shape[0], _facts(model).max_length
    check_prompts(prompts, n, vocab, context, params.max_tokens)
    generators = [generator] * len(prompts)
    if params.seed is not None:
        seeds = [params.for_prompt(i).seed for i in range(len(prompts))]
        generators = [torch.Generator(generator.device).manual_seed(seed or 0) for seed in seeds]
    stop = params.stop if params.stop is not None else getattr(model, "eos_token_ids", ())
    found: list[_Row] = []
    step = max(1, _MAX_ROWS // n)
    longest = max(len(p) for p in prompts) + params.max_tokens
    with torch.no_grad():
        for first in range(0, len(prompts), step):
            chunk = [p.tokens for p in prompts[first : first + step]]
            some = generators[first : first + step]
            found += _complete(_decoder(model, longest), chunk, n, params, frozenset(stop), ends, some)
    how = {"temperature": params.temperature, "top_p": params.top_p, "top_k": params.top_k}
    return [
        Rollout(
            i // n,
            row.tokens,
            row.logprobs,
            row.stop_reason,
            version,
            **how,  # type: ignore[arg-type]  # by name
            sampler_logprobs=row.tempered if params.temperature > 0 else None,
        )
        for i, row in enumerate(found)
    ]


@dataclass
class _Row:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tempered: list[float] = field(default_factory=list)
    stop_reason: str = "length"


def _complete(
    decoder: Decoder,
    prompts: Sequence[Tensor],
    n: int,
    params: SamplingParams,
    stop: frozenset[int],
    ends: Ends | None,
    generators: Sequence[torch.Generator],
) -> list[_Row]:
    rows = [_Row() for _ in range(len(prompts) * n)]
    alive = list(range(len(rows)))
    logits = decoder.start(prompts, n)
    for length in range(1, params.max_tokens + 1):
        chosen = choose_tokens(logits, params, [generators[row // n] for row in alive])
        policies = [logits] if params.temperature in (0.0, 1.0) else [logits, logits / params.temperature]
        scores = [torch.log_softmax(z, -1).gather(-1, chosen[:, None])[:, 0].tolist() for z in policies]
        for row, token, logprob, tempered in zip(alive, chosen.tolist(), scores[0], scores[-1], strict=True):
            rows[row].tokens.append(token)
            rows[row].logprobs.append(logprob)
            rows[row].tempered.append(tempered)
            if token in stop or (ends is not None and ends(rows[row].tokens)):
                rows[row].stop_reason = "stop"
        going = [i for i, row in enumerate(alive) if rows[row].stop_reason == "length"]
        alive = [alive[i] for i in going]
        if not alive or length == params.max_tokens:
            break
        keep = torch.tensor(going, device=chosen.device)
        logits = decoder.step(chosen[keep], keep)
    return rows


def _facts(model: CausalLM) -> ModelFacts:
    facts = getattr(model, "facts", None)
    return facts if isinstance(facts, ModelFacts) else ModelFacts()


def _decoder(model: CausalLM, longest: int) -> Decoder:
    """Return a decoder with a cache, where one gives what the model's own forward gives."""
    if not isinstance(model, HFModel):
        return PlainDecoder(model)
    changes = [n for n in (model.facts.longrope, model.facts.dynamic_rope) if n is not None]
    if any(longest > n for n in changes):  # a text that grows beyond them has other keys from its first token on
        return PlainDecoder(model)
    return CachedDecoder(model) if cache_agrees(model) else PlainDecoder(model)


def cache_agrees(model: HFModel) -> bool:
    """Return whether decoding with a cache gives the logits of whole forwards; tried once a model, on a few tokens.

    The prompts differ in length, are copied, and one completion leaves early, so that cache, mask and positions are used.
    """
    if model not in _agrees:
        difference: float | str
        try:
            with torch.no_grad(), in_float32(model):
                difference = _decoding_difference(CachedDecoder(model), PlainDecoder(model), _probe_prompts(model))
        except Exception as error:  # whatever a model raises that knows no such cache
            difference = f"{type(error).__name__}: {error}"
        limit = _HALF_TOLERANCE if model.head().weight.element_size() < 4 else _TOLERANCE
        _agrees[model] = isinstance(difference, float) and difference <= limit
        if not _agrees[model]:
            _logger.warning(
                "%s is sampled without a cache, at quadratic cost: with one its logits are not those of its forward (%s)",
                type(model.model).__name__,
                difference,
            )
    return _agrees[model]


def _probe_prompts(model: HFModel) -> list[Tensor]:
    vocab = model.head().weight.shape[0]
    window = max((n for n in model.facts.thresholds if n <= _PROBED), default=None)
    return [request.tokens for request in probe_sequences(vocab, window)[:3]]


def _decoding_difference(cached: Decoder, plain: Decoder, prompts: Sequence[Tensor]) -> float:
    """Return the largest relative difference of logits over a few steps; NaN if one is not finite."""
    found = [(cached.start(prompts, 2), plain.start(prompts, 2))]
    keeps = [[0, 1, 2, 3, 4, 5], [0, 2, 3, 5], [0, 1, 2, 3], [1, 2, 3]]
    for keep in keeps:
        kept = torch.tensor(keep, device=found[-1][1].device)
        tokens = found[-1][1][kept].argmax(-1)
        found.append((cached.step(tokens, kept), plain.step(tokens, kept)))
    differences = [float((a - b).norm() / b.norm()) for a, b in found]
    return max(differences) if all(d == d for d in differences) else float("nan")


@final
class PlainDecoder:
    """Runs the whole rows again at every step: for any model, at quadratic cost."""

    def __init__(self, model: CausalLM) -> None:
        self._model = model
        self._rows: list[Tensor] = []

    def start(self, prompts: Sequence[Tensor], n: int) -> Tensor:
        device = model_device(self._model)
        self._rows = [prompt.to(device) for prompt in prompts for _ in range(n)]
        return self._logits()

    def step(self, tokens: Tensor, keep: Tensor) -> Tensor:
        kept = [self._rows[i] for i in keep.tolist()]
        self._rows = [torch.cat([row, token[None]]) for row, token in zip(kept, tokens, strict=True)]
        return self._logits()

    def _logits(self) -> Tensor:
        last = []
        for row in self._rows:
            positions = torch.arange(row.numel(), device=row.device)[None]
            last.append(self._model.hidden_states(row[None], positions)[0, -1])
        return head_logits(torch.stack(last), self._model.head())


@final
class CachedDecoder:
    """transformers models: each prompt is read once, its cache is copied for its completions, finished rows leave."""

    def __init__(self, model: HFModel) -> None:
        self._model = model
        self._cache: Any = None
        self._mask = torch.empty(0)

    def start(self, prompts: Sequence[Tensor], n: int) -> Tensor:
        transformers = require_extra("transformers", "hf", "sampling")
        device, width = model_device(self._model), max(p.numel() for p in prompts)
        tokens = torch.zeros(len(prompts), width, dtype=torch.int64)
        self._mask = torch.zeros(len(prompts), width, dtype=torch.int64, device=device)
        for row, prompt in enumerate(prompts):
            tokens[row, width - prompt.numel() :] = prompt
            self._mask[row, width - prompt.numel() :] = 1
        self._cache = transformers.DynamicCache(config=self._model.config)
        logits = self._logits(tokens.to(device))
        self._cache.batch_repeat_interleave(n)
        self._mask = self._mask.repeat_interleave(n, 0)
        return logits.repeat_interleave(n, 0)

    def step(self, tokens: Tensor, keep: Tensor) -> Tensor:
        if keep.numel() < self._mask.shape[0]:
            self._cache.batch_select_indices(keep)
            self._mask = self._mask[keep]
        self._mask = torch.cat([self._mask, self._mask.new_ones(self._mask.shape[0], 1)], 1)
        return self._logits(tokens[:, None])

    def _logits(self, tokens: Tensor) -> Tensor:
        positions = (self._mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        hidden = self._model.cached_states(tokens, self._mask, positions, self._cache)
        return head_logits(hidden[:, -1], self._model.head())
