"""Tiny random models of the architectures in transformers: right in every layout that is used, or refused in words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from own_model import own_logprobs, sharing_prompt

pytest.importorskip("transformers", reason="the architectures are transformers' (extra hf)")

from pullback.backends import TorchBackend
from pullback.backends.native import HFModel
from pullback.errors import PullbackError, UnsupportedError
from pullback.testing.models import zoo

WINDOW = 8
SOME = (
    *("bloom", "falcon", "gpt2", "gpt_oss", "opt", "xglm", "stablelm", "deepseek_v3", "mixtral", "phi3"),
    *("olmo3", "starcoder2", "exaone4", "phimoe", "gemma4_text", "jamba", "qwen3_next", "mamba2", "gpt_neo", "moshi"),
)


def wrong(model: HFModel, plain: Any, prompts: tuple[int, ...]) -> dict[str, float]:
    """Largest difference from the model's own log-probs by layout, where it is more than 1e-5 nats."""
    found: dict[str, float] = {}
    first = TorchBackend(model)
    for layout in first.layouts(max(prompts) + 4 * WINDOW):
        backend = TorchBackend(model, layout=layout)
        for n in prompts:
            data = sharing_prompt(n, (4, WINDOW + 3, 2), n)
            outputs = backend.forward(data).result().loss_fn_outputs
            with torch.no_grad():
                own = [own_logprobs(plain, datum) for datum in data]
            pairs = zip(outputs, own, strict=True)
            off = max(float((o["logprobs"].to_torch() - x).abs().max()) for o, x in pairs)
            if not off <= 1e-5:
                found[layout] = max(off, found.get(layout, 0.0))
    return found


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", SOME)
def test_some_architectures(name: str) -> None:
    """Log-probs are the model's own, below and beyond a window, on every kind of architecture."""
    model, plain = (zoo.build(name, window=WINDOW) for _ in range(2))
    assert wrong(HFModel(model), plain.eval(), (5, 3 * WINDOW)) == {}


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


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", zoo.model_types())
def test_every_architecture(name: str) -> None:
    """As above for all, at forty windows too; a model that does not fit is refused in words."""
    try:
        with torch.device("meta"):
            size = sum(p.numel() for p in zoo.build(name, window=WINDOW).parameters())
        model, plain = (zoo.build(name, window=WINDOW) for _ in range(2) if size < 3e6)
    except Exception as error:
        pytest.skip(f"no tiny model: {type(error).__name__}: {error}")
    try:
        wrapped = HFModel(model)
        TorchBackend(wrapped)
    except PullbackError:
        return
    assert wrong(wrapped, plain.eval(), (5, 3 * WINDOW, 40 * WINDOW)) == {}


def test_a_model_that_cannot_run_is_refused_in_words() -> None:
    """Whatever a model raises on plain tokens, loading says it in one sentence."""
    with pytest.raises(UnsupportedError, match="RemBertForCausalLM cannot be run on tokens alone"):
        HFModel(zoo.build("rembert"))
