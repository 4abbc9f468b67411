"""Budgets: what is predicted of a step is what real steps hold and receive, and what a hand finds on paper."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks
from torch import Tensor

from pullback.backends import AdamParams, TorchBackend
from pullback.backends.native import HFModel
from pullback.backends.native.distributed.budget import Placement, Step, Weight, rank_memory, traffic
from pullback.backends.native.distributed.outline import graph_shape, model_outline, read_config
from pullback.backends.native.distributed.plan import plan_training, weights_of
from pullback.backends.native.models.lora import add_lora
from pullback.cli import main
from pullback.errors import CheckpointError, ConfigError, UnsupportedError
from pullback.testing import example_datums
from pullback.testing.models.llama import random_llama

transformers = pytest.importorskip("transformers", reason="needs the extra hf")
WORKER = Path(__file__).parent / "budget_worker.py"
LENGTHS = (30, 25, 41)
CASES = [
    {"dtype": dtype, "lora": lora, "reshard": reshard, "mesh": mesh, "streamed": streamed}
    for dtype, lora, reshard, mesh, streamed in (
        ("float32", False, False, [2], True),
        ("float32", False, True, [2], True),
        ("bfloat16", True, False, [2], False),
        ("bfloat16", True, True, [2], False),
        ("bfloat16", False, False, [2], True),
        ("bfloat16", False, True, [2], True),
        ("float32", False, False, [2, 1], True),
        ("float32", True, True, [2, 1], True),
    )
]


def storages(tensors: Sequence[Tensor]) -> int:
    """Bytes of the storages that tensors lie in, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("lora", [None, 4], ids=["full", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_one_process(dtype: torch.dtype, lora: int | None, checkpointed: bool) -> None:
    """Weights, masters, gradients and moments to the byte, graphs to 0.1 % (indices of untrained tokens)."""
    config = {
        "vocab_size": 96,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 200,
    }
    model = random_llama(dtype=dtype, **config)
    model = add_lora(model, lora) if lora else model
    expected = plan_training(
        model.config,
        Placement(),
        tokens=sum(LENGTHS),
        dtype=dtype,
        lora=lora,
        gradient_checkpointing=checkpointed,
        gpu=False,
    )
    shape = graph_shape(model, model.config, checkpointed=checkpointed)
    backend = TorchBackend(HFModel(model, gradient_checkpointing=checkpointed), mesh=None)
    result = backend.forward_backward(example_datums(list(LENGTHS), seed=3, vocab_size=96), "cross_entropy").result()
    gradients = storages([p.grad for p in model.parameters() if p.grad is not None])
    backend.optim_step(AdamParams()).result()
    state = backend._native.optimizer.to_tensors()
    memory = expected.memory
    assert memory.weights == storages(list(model.parameters()))
    assert memory.masters == storages([t for name, t in state.items() if name.startswith("master:")])
    assert memory.gradients == gradients
    assert memory.moments == storages([t for name, t in state.items() if name.startswith("exp_avg")])
    held = result.metrics["graph_bytes:max"]
    assert shape.per_token * sum(LENGTHS) == pytest.approx(held, rel=1e-3)
    other = replace(shape, checkpointed=not checkpointed)
    assert other.per_token * sum(LENGTHS) != pytest.approx(held, rel=0.5)
    assert expected.traffic.total == memory.gathered_weights == memory.gathered_gradients == 0


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """What each of two processes found in each case; one launch for all."""
    folder = tmp_path_factory.mktemp("budget")
    (folder / "cases.json").write_text(json.dumps(CASES))
    run_ranks(WORKER, str(folder))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: "-".join(map(str, CASES[i].values())))
def test_two_processes(case: int, two_ranks: list[list[dict[str, Any]]]) -> None:
    """Shards, and payload of the collectives, to the byte; graphs to 0.1 %; what is bound from above is not far below."""
    for rank in range(2):
        found = two_ranks[rank][case]
        predicted, held = found["predicted"], found["held"]
        for part in ("weights", "masters", "gradients", "moments"):
            assert held[part] == predicted[part], part
        assert predicted["graphs"] == pytest.approx(held["graphs"], rel=1e-3)
        if CASES[case]["reshard"]:
            assert held["gathered_gradients"] <= predicted["gathered_gradients"] <= 3 * held["gathered_gradients"]
        else:
            assert held["gathered_gradients"] == predicted["gathered_gradients"]
        arrives = CASES[case]["mesh"] == [2] or not CASES[case]["reshard"]  # nothing arrives where a shard is the whole
        assert predicted["gathered_weights"] <= held["gathered_weights"] * (1 if arrives else 1.5)
        assert held["gathered_weights"] <= predicted["gathered_weights"]
        told = dict(found["received"])
        if rank == 0 and not CASES[case]["streamed"]:  # it sends the cotangents
            told["logprobs"] += 4 * found["targets"]
        assert told | {"total": sum(told.values())} == found["traffic"]
        assert found["agreements"] < 40_000


@pytest.mark.slow
def test_two_processes_on_paper(two_ranks: list[list[dict[str, Any]]]) -> None:
    """The same from the config alone; and 2P(n-1)/n, or (P+T)(n-1)/n with an adapter, beside log-probs."""
    config = random_llama(vocab_size=512, num_hidden_layers=4, num_key_value_heads=2).config
    full, lora = two_ranks[0][0], two_ranks[0][2]
    weights, adapted = weights_of(model_outline(config)), weights_of(model_outline(config, dtype="bfloat16", lora=4))
    whole = sum(w.rows * w.row * 4 for w in weights)
    assert full["received"]["gathers"] + full["received"]["reductions"] == 2 * whole * (2 - 1) / 2
    mixed = sum(w.rows * w.row * w.bytes_each for w in adapted)
    trained = sum(w.rows * w.row * 4 for w in adapted if w.trained)
    assert lora["received"]["gathers"] + lora["received"]["reductions"] == (mixed + trained) * (2 - 1) / 2
    paper = plan_training(config, Placement(2), tokens=32)
    for part in ("weights", "gradients", "moments", "gathered_weights", "gathered_gradients"):
        assert getattr(paper.memory, part) == full["held"][part], part


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
    rows = (Path(__file__).parents[3] / "docs" / "memory.md").read_text().split("\n## 70 billion")[1].splitlines()
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
