"""What a model lets through: sequences must not see each other, nor the future. Probed once, at load."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Final, Literal, cast, final

import torch
from torch import Tensor, nn

from .....errors import ConfigError, LeakyModelError, UnsupportedError
from ....calls.requests import ScoreRequest
from ...causal_lm import CausalLM
from ...execution.batching import Layout, arrange
from ...execution.forward import model_device, needed_hidden, trainable
from ...execution.memory import GraphMeter
from .model_facts import ModelFacts
from .probing import SHORT, in_float32, perturbed_adapters, shortened

__all__ = ["LayoutLimits", "layout_limits", "measure_graph", "probe_sequences", "require_causal"]

_logger = logging.getLogger(__name__)
_TOLERANCE: Final = {torch.float64: 1e-6, torch.float32: 1e-4}
_HALF_TOLERANCE: Final = 5e-2
_SEVERAL: Final[tuple[Layout, ...]] = ("packed", "forked", "padded")
_AFFORDABLE: Final = 5e10  # multiply-adds of the probes of one threshold


@final
@dataclass(frozen=True)
class LayoutLimits:
    """How long the longest sequence of a forward may be in each layout.

    Attributes:
        longest: by layout, cheapest first: tokens, or None where no length is too long. A layout that is not named keeps no
            two sequences apart. ``single`` holds for every length.
        reasons: why a layout is limited or missing.
    """

    longest: Mapping[Layout, int | None] = field(default_factory=dict)
    reasons: Mapping[Layout, str] = field(default_factory=dict)

    def allowed(self, length: int | None = None) -> tuple[Layout, ...]:
        """Return the layouts for forwards whose longest sequence has so many tokens (None: any), cheapest first."""
        fitting = (
            name for name, most in self.longest.items() if most is None or (length is not None and length <= most)
        )
        return (*fitting, "single")

    @classmethod
    def whatever_the_length(cls, layout: Layout) -> LayoutLimits:
        """Return limits that allow one layout everywhere, known to be exact or not: to examine it."""
        return cls({} if layout == "single" else {layout: None})

    def shared_with(self, reference: LayoutLimits) -> LayoutLimits:
        """Return the limits within which a reference keeps sequences apart too: both score in the same layout."""
        longest: dict[Layout, int | None] = {}
        for layout in (name for name in self.longest if name in reference.longest):
            given = [most for most in (self.longest[layout], reference.longest[layout]) if most is not None]
            longest[layout] = min(given, default=None)
        others = {layout: f"the reference: {reason}" for layout, reason in reference.reasons.items()}
        return LayoutLimits(longest, {**others, **self.reasons})

    def asked_for(self, layout: Layout | Literal["auto"]) -> LayoutLimits:
        """Return the limits of the layout that a user asks for; ``auto``: these.

        Raises:
            ConfigError: there is no such layout.
            LeakyModelError: it does not keep sequences apart.
        """
        if layout == "auto":
            return self
        if layout not in (*_SEVERAL, "single"):
            raise ConfigError(f"layout must be auto, packed, forked, padded or single, got {layout!r}")
        if layout not in self.allowed():
            most = self.longest.get(layout)
            where = "" if most is None else f" beyond {most} tokens"
            raise LeakyModelError(
                f"layout={layout!r}: this model lets sequences of one forward see each other{where} "
                f"({self.reasons.get(layout, 'not tried')}); at any length it keeps them apart in: "
                f"{', '.join(self.allowed())}; use one of these, or layout='auto'"
            )
        return LayoutLimits({} if layout == "single" else {layout: self.longest[layout]}, self.reasons)


def require_causal(model: CausalLM, vocab_size: int) -> None:
    """Check that the last token does not change what comes before it.

    Raises:
        LeakyModelError: it does: log-probs of such a model say nothing about generation.
    """
    first = probe_sequences(vocab_size)[0]
    changed = first.tokens.clone()
    changed[-1] = (changed[-1] + 1) % vocab_size
    other = ScoreRequest(changed, first.targets, first.needed)
    with _probed(model) as hidden:
        before, after = (hidden([r], "padded")[:-1] for r in (first, other))
    if not _same(before, after):
        raise LeakyModelError(
            "the model is not causal: changing the last token changes the hidden states before it "
            f"(relative difference {_difference(before, after):.2g}); a causal language model is needed"
        )


def layout_limits(model: CausalLM, vocab_size: int) -> LayoutLimits:
    """Return the layouts in which several sequences together give what each gives alone, and up to which length.

    Each is tried on a few tokens, and beyond every length at which the config says that something changes: at that
    length where it is affordable, else with the window or context made short for the moment.

    Args:
        model: what it says of lengths is read from its ``facts``, if it has them.
        vocab_size: V.
    """
    facts = getattr(model, "facts", ModelFacts())
    longest: dict[Layout, int | None] = dict.fromkeys(_SEVERAL)
    reasons: dict[Layout, str] = {}
    if _masks_by_buffer(cast(nn.Module, model), facts.max_length):
        together: tuple[Layout, ...] = ("packed", "forked")
        for layout in together:
            del longest[layout]
            reasons[layout] = f"the model's own mask is a buffer: no row may be longer than {facts.max_length} tokens"
    with _probed(model) as hidden:
        _drop_leaking(hidden, probe_sequences(vocab_size), longest, reasons)
        for threshold in facts.thresholds:
            several = probe_sequences(vocab_size, threshold)
            open_ended: dict[Layout, int | None] = {name: None for name, most in longest.items() if most is None}
            if _affordable(model, facts, several):
                _drop_leaking(hidden, several, open_ended, reasons)
            elif not _probe_shortened(model, hidden, vocab_size, open_ended, reasons):
                open_ended.clear()
            for name in [n for n, most in longest.items() if most is None and n not in open_ended]:
                longest[name] = threshold
                reasons.setdefault(name, f"not known beyond {threshold} tokens: {'; '.join(facts.reasons)}")
    return LayoutLimits(longest, reasons)


def measure_graph(model: CausalLM, vocab_size: int, layout: Layout, meter: GraphMeter) -> None:
    """Build one small graph, so that the first real one can be predicted, and run it backward to its beginning.

    Raises:
        UnsupportedError: it cannot be run backward as it is evaluated, without dropout.
    """
    pair = list(probe_sequences(vocab_size)[:2])
    begun: list[Tensor] = []
    with ExitStack() as hooks:
        for one in cast(nn.Module, model).modules():
            if isinstance(one, nn.Embedding):
                hooks.callback(one.register_forward_hook(lambda _, __, out: begun.append(out)).remove)
        with torch.enable_grad(), meter.measuring(sum(r.length for r in pair)):
            hidden = needed_hidden(model, pair, layout)
    _run_backward(hidden, [x for x in begun if x.requires_grad] or list(trainable(cast(nn.Module, model)).values()))


def _run_backward(hidden: Tensor, sources: Sequence[Tensor]) -> None:
    if not hidden.requires_grad:
        return
    try:
        with torch.enable_grad():
            torch.autograd.grad(hidden.sum(), sources[0], allow_unused=True)
    except Exception as error:  # whatever a model's own backward raises
        raise UnsupportedError(f"the model cannot be trained in evaluation mode, without dropout: {error}") from error


def probe_sequences(vocab_size: int, threshold: int | None = None) -> list[ScoreRequest]:
    """Return a few sequences, some of which begin alike; on both sides of a length, where one is given."""
    generator = torch.Generator().manual_seed(0)
    length, half = (6, 4) if threshold is None else (threshold + max(2, threshold // 2), max(4, threshold // 2 + 1))
    first, second, other = (torch.randint(vocab_size, (n,), generator=generator) for n in (length, half, length))
    if threshold is None:
        tokens = [first, second, torch.cat([first[:4], other[:3]])]
    else:
        early, late = torch.cat([first[:half], other[half:]]), torch.cat([first[:-1], other[:4]])
        tokens = [first, second, early, late, torch.cat([first[: half - 1], other[:1]])]
    return [ScoreRequest(t, t, torch.ones_like(t, dtype=torch.bool)) for t in tokens]


_Hidden = Callable[[Sequence[ScoreRequest], Layout], Tensor]


class _probed:
    """The model as it is probed; entering gives its hidden states of sequences in a layout, [N, H]."""

    def __init__(self, model: CausalLM) -> None:
        self._model = model
        self._stack = ExitStack()

    def __enter__(self) -> _Hidden:
        module = cast(nn.Module, self._model)
        self._stack.enter_context(torch.no_grad())
        self._stack.enter_context(perturbed_adapters(module))
        self._stack.enter_context(in_float32(module))
        return lambda requests, layout: _hidden(self._model, requests, layout)

    def __exit__(self, *error: Any) -> None:
        self._stack.close()


def _drop_leaking(
    hidden: _Hidden, several: Sequence[ScoreRequest], layouts: dict[Layout, int | None], reasons: dict[Layout, str]
) -> None:
    """Keep the layouts in which these sequences give what each gives alone; one in which the model fails is dropped too."""
    alone = torch.cat([hidden([r], "padded") for r in several])
    for layout in list(layouts):
        try:
            difference = _difference(hidden(several, layout), alone)
            words = f"sequences see each other (relative difference {difference:.2g})"
        except Exception as error:  # whatever a model raises in a layout that it does not know
            difference, words = float("inf"), f"{type(error).__name__}: {error}"
        if not difference <= _tolerance(alone):
            del layouts[layout]
            reasons[layout] = words
            _logger.info("layout %s is not used: %s", layout, words)


def _probe_shortened(
    model: CausalLM, hidden: _Hidden, vocab_size: int, layouts: dict[Layout, int | None], reasons: dict[Layout, str]
) -> bool:
    """Drop what leaks beyond a short window or context; False if making it short changes nothing, and so shows nothing."""
    if getattr(model, "facts", ModelFacts()).dynamic_rope is not None:
        return False
    several = probe_sequences(vocab_size, SHORT)
    before = hidden(several[:1], "padded")
    with shortened(cast(nn.Module, model)):
        if _same(before, hidden(several[:1], "padded")):
            return False
        _drop_leaking(hidden, several, layouts, reasons)
    return True


def _masks_by_buffer(module: nn.Module, context: int | None) -> bool:
    """Whether a model keeps a mask of its context, so that a row of several sequences can be too long for it (GPT-Neo)."""
    return context is not None and any(b.shape[-2:] == (context, context) for b in module.buffers())


def _affordable(model: CausalLM, facts: ModelFacts, several: Sequence[ScoreRequest]) -> bool:
    size = sum(p.numel() for p in cast(nn.Module, model).parameters())
    fits = facts.max_length is None or max(r.length for r in several) <= facts.max_length
    return fits and 4.0 * size * sum(r.length for r in several) <= _AFFORDABLE


def _hidden(model: CausalLM, requests: Sequence[ScoreRequest], layout: Layout) -> Tensor:
    rows = arrange(requests, layout, model_device(model))
    return model.hidden_states(rows.tokens, rows.positions).flatten(0, 1)[rows.place]


def _difference(a: Tensor, b: Tensor) -> float:
    """Return the largest relative difference of a token's hidden states."""
    a, b = a.double(), b.double()
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=1e-30)).max())


def _same(a: Tensor, b: Tensor) -> bool:
    return _difference(a, b) <= _tolerance(a)


def _tolerance(hidden: Tensor) -> float:
    return _TOLERANCE.get(hidden.dtype, _HALF_TOLERANCE)
