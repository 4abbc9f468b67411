"""Budgets on paper: what a hand finds, what the command prints, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pullback.backends.native.distributed.budget import Placement, Step, Weight, rank_memory, traffic
from pullback.backends.native.distributed.budget.outline import graph_shape, model_outline, read_config
from pullback.backends.native.distributed.plan import plan_training, weights_of
from pullback.backends.native.models.lora import add_lora
from pullback.cli import main
from pullback.errors import CheckpointError, ConfigError, UnsupportedError
from pullback.testing.models.llama import random_llama

transformers = pytest.importorskip("transformers", reason="needs the extra hf")

MODELS = st.lists(
    st.builds(
        Weight,
        rows=st.integers(1, 40),
        row=st.integers(1, 9),
        bytes_each=st.sampled_from([2, 4]),
        trained=st.booleans(),
        layer=st.one_of(st.none(), st.integers(0, 3)),
    ),
    min_size=1,
    max_size=8,
)


@given(
    model=MODELS,
    shards=st.integers(2, 9),
    replicas=st.integers(1, 4),
    passes=st.integers(1, 5),
    calls=st.integers(1, 3),
)
def test_resharding_trades(model: list[Weight], shards: int, replicas: int, passes: int, calls: int) -> None:
    """Freed layers never hold more and never receive less; replicas hold what shards hold, and tell each other the rest."""
    step = Step(forwards=passes, backwards=passes, calls=min(calls, passes))
    kept = Placement(shards * replicas, replicas)
    freed = replace(kept, reshard=True)
    assert rank_memory(model, freed, step).gathered_weights <= rank_memory(model, kept, step).gathered_weights
    assert traffic(model, freed, step).total >= traffic(model, kept, step).total
    alone = rank_memory(model, Placement(shards), step)
    assert alone == rank_memory(model, kept, step)
    assert (traffic(model, kept, step).replicas > 0) == (replicas > 1 and any(w.trained for w in model))


@given(model=MODELS, shards=st.integers(2, 9))
def test_shards_cover(model: list[Weight], shards: int) -> None:
    """All shards together hold the whole, and less than one row a rank beyond; one process is moved nothing."""
    for weight in model:
        whole, together = weight.rows * weight.row, weight.shard(shards) * shards
        assert whole <= together < whole + shards * weight.row
    assert traffic(model, Placement(), Step(targets=9)).total == 0


def by_hand(config: dict[str, int]) -> dict[str, int]:
    """Parameters of a Llama, by its shapes."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    layer = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * inner + 2 * hidden
    return {
        "layer": layer,
        "root": 2 * vocab * hidden + hidden,
        "all": config["num_hidden_layers"] * layer + 2 * vocab * hidden + hidden,
    }


def require_by_hand(config: dict[str, Any], ranks: int, tokens: int) -> None:
    """Compare a checkpointed bf16 model, sharded and fully trained, with arithmetic that is written out."""
    sizes, micro_batches = by_hand(config), 2
    plan = plan_training(
        transformers.LlamaConfig(**config),
        Placement(ranks, reshard=True),
        tokens=tokens,
        dtype="bfloat16",
        gradient_checkpointing=True,
        micro_batches=micro_batches,
    )
    held, moved = plan.memory, plan.traffic
    assert plan.parameters == plan.trained == sizes["all"]
    assert held.weights == held.gradients == 4 * sizes["all"] / ranks  # fp32 shards
    assert held.moments == 8 * sizes["all"] / ranks
    assert held.gathered_weights == 2 * (sizes["root"] + 2 * sizes["layer"])
    assert held.gathered_gradients == 2 * sizes["root"] + max(4 * sizes["root"], 6 * sizes["layer"])
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    norm = 4 * hidden + 4 + 2 * hidden
    layer = 2 * norm + 2 * (2 * hidden + 2 * keys) + 4 * config["num_attention_heads"] + 6 * inner
    layer += 2 * (hidden + hidden + hidden + inner)  # inputs of the matrices
    assert held.graphs == tokens * (24 + norm + 2 * hidden * config["num_hidden_layers"] + layer)
    layers = 2 * config["num_hidden_layers"] * sizes["layer"]
    assert moved.gathers == pytest.approx(
        (2 * sizes["root"] + 2 * micro_batches * layers) * (ranks - 1) / ranks, rel=1e-12
    )
    assert moved.reductions == pytest.approx(micro_batches * 4 * sizes["all"] * (ranks - 1) / ranks, rel=1e-12)
    assert moved.logprobs == 2 * micro_batches * tokens * 4 * (ranks - 1)


SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "tie_word_embeddings": False,
}
LARGE = SMALL | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


def test_by_hand() -> None:
    """A small Llama on four processes."""
    require_by_hand(SMALL, 4, 100)


@pytest.mark.slow
def test_70b_by_hand() -> None:
    """Llama 70B on 64, as docs/memory.md has it."""
    require_by_hand(LARGE, 64, 8192)


@pytest.mark.slow
def test_70b_table() -> None:
    """The table of docs/memory.md is what the formulas say."""
    rows = (Path(__file__).parents[4] / "docs" / "memory.md").read_text().split("\n## 70 billion")[1].splitlines()
    cells = {
        row.split("|")[1].strip(" *"): [float(x) for x in row.split("|")[2:6]]
        for row in rows
        if "." in row[:60] and row[0] == "|"
    }
    config = transformers.LlamaConfig(**LARGE)
    for column, (lora, reshard) in enumerate(((None, False), (None, True), (32, False), (32, True))):
        found = plan_training(
            config,
            Placement(64, reshard=reshard),
            tokens=8192,
            dtype="bfloat16",
            lora=lora,
            gradient_checkpointing=True,
        )
        parts = {name.replace("_", " "): value for name, value in found.memory.to_json().items()}
        parts |= {"held at most": found.memory.total, "received in a step": found.traffic.total}
        assert len(cells) == 9
        for name, values in cells.items():
            assert values[column] == round(parts[name] / 2**30, 3), (name, column)


def test_an_outline_is_the_model() -> None:
    """A config alone tells the same weights as the model itself, with an adapter and without."""
    real = random_llama(dtype=torch.bfloat16)
    assert weights_of(model_outline(real.config, dtype="bfloat16")) == weights_of(real)
    adapted = add_lora(real, 4)
    assert weights_of(model_outline(real.config, dtype="bfloat16", lora=4)) == weights_of(adapted)
    assert {w.layer for w in weights_of(adapted)} == {None, 0, 1}


def config_file(folder: Path, **changes: Any) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps({"model_type": "llama", **SMALL, **changes}))
    return str(path)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`pullback plan` reads a file or its folder, and prints a table or JSON lines."""
    words = [
        "plan",
        "--model",
        config_file(tmp_path),
        "--ranks",
        "4",
        "--tokens",
        "100",
        "--dtype",
        "bfloat16",
        "--lora",
        "4",
    ]
    assert main(words) == 0
    table = capsys.readouterr().out
    assert "gathered once    layers freed" in table
    assert main(["plan", "--model", str(tmp_path), *words[3:], "--json", "--reshard", "true"]) == 0
    found = json.loads(capsys.readouterr().out)
    config = transformers.LlamaConfig(**SMALL)
    expected = plan_training(config, Placement(4, reshard=True), tokens=100, dtype="bfloat16", lora=4)
    assert found == expected.to_json()
    assert f"{expected.parameters:,} parameters, {expected.trained:,} trained" in table
    assert (
        main(["plan", "--model", str(tmp_path), "--function", "--micro-batches", "3", "--tokens", "50", "--json"]) == 0
    )
    alone = json.loads(capsys.readouterr().out)
    once = plan_training(config, Placement(), tokens=50)
    assert alone["rank_bytes"]["graphs"] == 3 * once.memory.graphs
    assert main(["plan", "--model", str(tmp_path), "--tokens", "50", "--calls", "2"]) == 0
    assert "held" in capsys.readouterr().out


def test_refusals(tmp_path: Path) -> None:
    """What cannot be planned says why, and what to do."""
    with pytest.raises(ConfigError, match="6 ranks and 4 replicas"):
        Placement(6, 4)
    with pytest.raises(ConfigError, match="calls"):
        Step(calls=-1)
    with pytest.raises(ConfigError, match="graph_bytes"):
        Step(graph_bytes=math.nan)
    with pytest.raises(CheckpointError, match="no config that transformers can read"):
        read_config(tmp_path / "nothing")
    for text in ("{}", "[", '{"model_type": "no such"}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match="model_type"):
            read_config(tmp_path / "config.json")
    other = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64)
    with pytest.raises(UnsupportedError, match="known for Llama-shaped layers"):
        plan_training(other, Placement(2), tokens=10)
    measured = plan_training(other, Placement(2), tokens=10, graph_bytes_per_token=50.0)
    assert measured.memory.graphs == 500
    with pytest.raises(UnsupportedError, match="no causal language model"):
        model_outline(transformers.CLIPVisionConfig())
    with pytest.raises(UnsupportedError, match="quantised"):
        model_outline(transformers.LlamaConfig(**SMALL, quantization_config={"quant_method": "bitsandbytes"}))
    llama = transformers.LlamaConfig(**SMALL)
    with pytest.raises(UnsupportedError, match="float16"):
        plan_training(llama, Placement(2), tokens=10, dtype="float16")
    frozen = model_outline(llama)
    next(iter(frozen.parameters())).requires_grad_(False)
    with pytest.raises(UnsupportedError, match="part of the weights is frozen"):
        graph_shape(frozen, llama, checkpointed=False)
