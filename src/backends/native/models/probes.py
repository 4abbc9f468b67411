"""What a model lets through: sequences must not see each other, nor the future. Probed once, at load."""

from __future__ import annotations

import torch
from torch import Tensor

from ....errors import LeakyModelError
from ...prepared import ScoreRequest
from ..causal_lm import CausalLM
from ..execution.batching import Layout, arrange
from ..execution.forward import model_device, needed_hidden
from ..execution.memory import GraphMeter

__all__ = ["isolated_layouts", "measure_graph", "require_causal"]

_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
_HALF_TOLERANCE = 5e-2


def require_causal(model: CausalLM, vocab_size: int) -> None:
    """Check that the last token does not change what comes before it.

    Raises:
        LeakyModelError: it does: log-probs of such a model say nothing about generation.
    """
    first, _ = _sequences(vocab_size)
    changed = first.tokens.clone()
    changed[-1] = (changed[-1] + 1) % vocab_size
    other = ScoreRequest(changed, first.targets, first.needed)
    before, after = (_hidden(model, [r], "padded")[:-1] for r in (first, other))
    if not _same(before, after):
        raise LeakyModelError(
            "the model is not causal: changing the last token changes the hidden states before it "
            f"(relative difference {_difference(before, after):.2g}); a causal language model is needed"
        )


def isolated_layouts(model: CausalLM, vocab_size: int) -> tuple[Layout, ...]:
    """Return the layouts in which several sequences together give what each gives alone, cheapest first.

    ``single`` is always among them.
    """
    several = [*_sequences(vocab_size), _fork(vocab_size)]
    alone = torch.cat([_hidden(model, [r], "padded") for r in several])
    kept: list[Layout] = []
    for layout in ("packed", "forked", "padded"):
        if _same(_hidden(model, several, layout), alone):
            kept.append(layout)
    return (*kept, "single")


def measure_graph(model: CausalLM, vocab_size: int, layout: Layout, meter: GraphMeter) -> None:
    """Build one small graph, so that the first real one can be predicted."""
    pair = list(_sequences(vocab_size))
    with torch.enable_grad(), meter.measuring(sum(r.length for r in pair)):
        needed_hidden(model, pair, layout)


def _sequences(vocab_size: int) -> tuple[ScoreRequest, ScoreRequest]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(vocab_size, (n,), generator=generator) for n in (6, 4)]
    first, second = (ScoreRequest(t, t, torch.ones_like(t, dtype=torch.bool)) for t in drawn)
    return first, second


def _fork(vocab_size: int) -> ScoreRequest:
    """A sequence that begins like the first one."""
    first, other = _sequences(vocab_size)
    tokens = torch.cat([first.tokens[:4], other.tokens[:3]])
    return ScoreRequest(tokens, tokens, torch.ones_like(tokens, dtype=torch.bool))


@torch.no_grad()
def _hidden(model: CausalLM, requests: list[ScoreRequest], layout: Layout) -> Tensor:
    rows = arrange(requests, layout, model_device(model))
    return model.hidden_states(rows.tokens, rows.positions).flatten(0, 1)[rows.place]


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))


def _same(a: Tensor, b: Tensor) -> bool:
    return _difference(a, b) <= _TOLERANCE.get(a.dtype, _HALF_TOLERANCE)
