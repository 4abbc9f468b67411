"""Tiny random models of the architectures in transformers: right in every layout that is used, or refused in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="the architectures are transformers' (extra hf)")

from pullback.backends import TorchBackend
from pullback.backends.native import HFModel
from pullback.backends.native.models import packed_attention
from pullback.backends.native.models.facts import probes
from pullback.errors import UnsupportedError
from pullback.testing.models import zoo
from pullback.testing.models.zoo_table import PROMPTS, VARIANTS, WINDOW, ZooRow, examine, markdown, sharing_prompt

CHEAP = ("gpt2", "mistral", "phi3, longrope", "llama, dynamic NTK")
SOME = (
    *("bloom", "falcon", "gpt_oss", "opt", "xglm", "stablelm", "deepseek_v3", "mixtral", "phi3", "lfm2"),
    *("olmo3", "starcoder2", "exaone4", "phimoe", "gemma4_text", "jamba", "qwen3_next", "mamba2", "gpt_neo", "moshi"),
)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", [*CHEAP, *(pytest.param(name, marks=pytest.mark.slow) for name in SOME)])
def test_some_architectures(name: str) -> None:
    """Log-probs and gradients are the model's own, below and beyond a window, on every kind of architecture."""
    row = examine(name, PROMPTS[:2])
    assert (row.verdict, row.reason) == ("right", "")


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*zoo.model_types(), *VARIANTS])
def test_every_architecture(name: str) -> None:
    """As above for all, at forty windows too; a model that does not fit is refused in words."""
    row = examine(name)
    if row.verdict == "not built":
        pytest.skip(f"no tiny model: {row.reason}")
    assert row.verdict in ("right", "refused"), row.reason


def test_the_table_shows_a_wrong_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: attention that counts places in the row is wrong on forks, if the probes do not see it."""
    related: Callable[..., Tensor] = packed_attention.PackedRow._related

    def by_place(row: packed_attention.PackedRow, positions: Tensor) -> Tensor:
        place = torch.arange(len(positions))
        return related(row, positions) & (place[None, :] > place[:, None] - WINDOW)

    monkeypatch.setattr(packed_attention.PackedRow, "_related", by_place)
    row = examine("mistral", PROMPTS[:2])
    assert row.verdict == "right"
    assert "forked" not in row.layouts[PROMPTS[1]]
    monkeypatch.setattr(probes, "_difference", lambda a, b: 0.0)
    row = examine("mistral", PROMPTS[:2])
    assert row.verdict == "wrong"
    assert "forked, prompt of 24 tokens" in row.reason
    assert "| mistral | wrong | packed, forked, padded, single |" in markdown([row, ZooRow("other", "right")])


def test_the_table_shows_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a gradient that is not the model's own, under log-probs that are."""
    gradients = TorchBackend.gradients

    def halved(backend: TorchBackend, *given: Any) -> dict[str, Tensor]:
        return {name: x / 2 for name, x in gradients(backend, *given).items()}

    monkeypatch.setattr(TorchBackend, "gradients", halved)
    row = examine("gpt2", PROMPTS[:1])
    assert row.verdict == "wrong"
    assert row.nats is not None
    assert row.nats < 1e-5


def test_rows_longer_than_a_mask_that_is_kept() -> None:
    """GPT-Neo keeps a mask of its context: several texts go padded, so that a row never is longer than that."""
    model = HFModel(zoo.build("gpt_neo", window=WINDOW, max_position_embeddings=64))
    backend = TorchBackend(model)
    assert backend.layouts() == ("padded", "single")
    data = sharing_prompt(50, (4, 8, 2))
    assert len(backend.forward(data).result().loss_fn_outputs) == 3
    tokens = torch.arange(128)[None] % 64
    with pytest.raises(RuntimeError):  # negative control
        model.hidden_states(tokens, torch.arange(64).repeat(2)[None])


def test_a_model_that_cannot_run_is_refused_in_words() -> None:
    """Whatever a model raises on plain tokens, loading says it in one sentence."""
    with pytest.raises(UnsupportedError, match="RemBertForCausalLM cannot be run on tokens alone"):
        HFModel(zoo.build("rembert"))


def test_a_trained_parameter_of_the_logits_is_refused() -> None:
    """A scale of each token's logit is one at its start: log-probs are right, and its gradient would be lost."""
    model = zoo.build("dory", window=WINDOW)
    with pytest.raises(UnsupportedError, match="trains logit_scale beside"):
        HFModel(model)
    model.lm_head.logit_scale.requires_grad_(False)
    HFModel(model)  # negative control: frozen, it is a scale like any other, and here one


def test_a_model_that_cannot_be_run_backward_is_refused() -> None:
    """Reformer's reversible layers have a backward in training mode only, with dropout."""
    with pytest.raises(UnsupportedError, match="cannot be trained in evaluation mode, without dropout: If you want"):
        TorchBackend(HFModel(zoo.build("reformer")))
