"""Rotary embeddings that depend on the longest text of a forward: a text's log-probs do not depend on its neighbours."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="these rotary embeddings are transformers' own (extra hf)")

from pretrained.own_model import largest_error, own_logprobs, sharing_prompt
from pretrained.ropes import CONTEXT, ROPES

from pullback.backends import TorchBackend
from pullback.backends.native import HFModel
from pullback.backends.native.models import hf
from pullback.backends.native.models.facts import probes
from pullback.backends.native.models.facts.probes import layout_limits
from pullback.datums import Datum
from pullback.testing.models import zoo


def phi3() -> Any:
    """A tiny Phi-3 whose texts of more than 16 tokens have other frequencies."""
    return zoo.build("phi3", **copy.deepcopy(ROPES["phi3"]))


def dynamic() -> Any:
    """A tiny Llama with dynamic NTK scaling."""
    return zoo.build("llama", **copy.deepcopy(ROPES["llama"]))


def mixed() -> list[Datum]:
    """Texts on both sides of the context, some with a common prompt."""
    return [*sharing_prompt(5, (4, 30, 8)), *sharing_prompt(40, (3, 6), 1)]


@pytest.mark.parametrize("affordable", [0.0, 1e12])
def test_longrope_is_packed_by_length(affordable: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several texts go together, packed; a shared prompt only where all are short; with the context made short as at it."""
    monkeypatch.setattr(probes, "_AFFORDABLE", affordable)
    limits = layout_limits(HFModel(phi3()), 64)
    assert limits.longest == {"packed": None, "forked": CONTEXT, "padded": CONTEXT}
    assert limits.allowed(CONTEXT) == ("packed", "forked", "padded", "single")
    assert limits.allowed(CONTEXT + 1) == ("packed", "single")
    backend = TorchBackend(HFModel(phi3()))
    assert backend.plan("cross_entropy", mixed()).layout == "packed"
    assert largest_error(backend, phi3().eval(), mixed()) < 1e-5


def test_short_and_long_together_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: in one forward the long texts decide for the short ones, and the probes notice."""
    model = HFModel(phi3())
    monkeypatch.setattr(
        hf, "forward_by_length", lambda tokens, positions, threshold, forward: forward(tokens, positions)
    )
    assert layout_limits(model, 64).longest["packed"] == CONTEXT


def test_dynamic_scaling_goes_one_by_one_and_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each length has its own frequencies: one text a forward, whatever came before."""
    assert set(layout_limits(HFModel(dynamic()), 64).longest.values()) == {CONTEXT}

    def error(backend: TorchBackend) -> float:
        outputs = backend.forward(mixed()).result().loss_fn_outputs
        with torch.no_grad():  # a new model each time: transformers' own remembers the longest text
            own = [own_logprobs(dynamic().eval(), datum) for datum in mixed()]
        return max(float((o["logprobs"].to_torch() - x).abs().max()) for o, x in zip(outputs, own, strict=True))

    assert error(TorchBackend(HFModel(dynamic()))) < 1e-5
    monkeypatch.setattr(hf, "reset_dynamic_rope", lambda model: None)  # negative control
    backend = TorchBackend(HFModel(dynamic()))
    backend.forward(sharing_prompt(60, (8, 9))).result()
    assert error(backend) > 1e-3
