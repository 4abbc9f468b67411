"""Models whose layers see only a window or a chunk: right in every layout, at lengths around and beyond it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="windowed models are transformers' own (extra hf)")

from pretrained.own_model import largest_error, own_logprobs, sharing_prompt
from tiers import sampled

from pullback.backends import TorchBackend
from pullback.backends.native import HFModel
from pullback.backends.native.models import packed_attention
from pullback.backends.native.models.facts.model_facts import ModelFacts
from pullback.errors import LeakyModelError
from pullback.losses import CrossEntropy
from pullback.testing.models import zoo

WINDOW = 8
MODELS = ("mistral", "gemma2", "gemma3_text", "cohere2", "llama4_text")


@pytest.mark.parametrize("layout", ["forked", "packed", "padded"])
@pytest.mark.parametrize("name", sampled(MODELS, ("mistral", "gemma3_text", "llama4_text")))
def test_beyond_the_window(name: str, layout: Any) -> None:
    """Log-probs and gradients are the model's own, on prompts of less than a window, three windows and forty."""
    for prompt in (WINDOW - 3, 3 * WINDOW, 40 * WINDOW):
        model, plain = zoo.build(name, window=WINDOW), zoo.build(name, window=WINDOW).eval()
        data = sharing_prompt(prompt, (4, WINDOW + 3, 2))
        wrapped = HFModel(model)
        if (
            layout == "forked" and not wrapped.attends_by_segment
        ):  # Gemma 2 caps its scores: only its own attention does
            with pytest.raises(LeakyModelError, match="forked"):
                TorchBackend(wrapped, layout=layout)
            return
        backend = TorchBackend(wrapped, layout=layout)
        assert backend.plan("cross_entropy", data).layout == layout
        assert largest_error(backend, plain, data) < 1e-5
        backend.forward_backward(data, CrossEntropy("sum")).result()
        weights = [d.loss_fn_inputs["weights"].to_torch() for d in data]
        torch.stack([-(own_logprobs(plain, d) * w).sum() for d, w in zip(data, weights, strict=True)]).sum().backward()
        expected = {"model." + n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
        found = backend.gradients()
        off = torch.stack([(found[n] - g).square().sum() for n, g in expected.items()]).sum().sqrt()
        assert off < 1e-5 * torch.stack([g.square().sum() for g in expected.values()]).sum().sqrt()


def test_a_window_by_place_in_the_row_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a window that counts places in the row loses the shared prompt."""
    related = packed_attention.PackedRow._related

    def by_place(row: packed_attention.PackedRow, positions: Tensor) -> Tensor:
        place = torch.arange(len(positions))
        return related(row, positions) & (place[None, :] > place[:, None] - WINDOW)

    monkeypatch.setattr(packed_attention.PackedRow, "_related", by_place)
    wrapped, plain = HFModel(zoo.build("mistral", window=WINDOW)), zoo.build("mistral", window=WINDOW).eval()
    with pytest.raises(LeakyModelError, match=f"forked.*beyond {WINDOW} tokens"):
        TorchBackend(wrapped, layout="forked")
    auto = TorchBackend(wrapped)
    assert "forked" in auto.layouts(WINDOW)
    assert "forked" not in auto.layouts(WINDOW + 1)
    wrapped.facts = ModelFacts()  # the probes then stay below the window, and notice nothing
    backend = TorchBackend(wrapped, layout="forked")
    assert largest_error(backend, plain, sharing_prompt(3 * WINDOW, (4, 6, 5))) > 1e-2
