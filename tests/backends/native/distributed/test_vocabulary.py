"""A head whose rows are dealt out to the processes is the whole head on one: to 1e-10 in fp64, at the stated cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from many_ranks import vocabulary_ranks
from many_ranks.ranks import reports, run_ranks
from many_ranks.vocabulary_ranks import CASES, FEW, name_of

from pullback.backends import TorchBackend
from pullback.backends.native.distributed.budget import Placement
from pullback.backends.native.distributed.plan import plan_training
from pullback.backends.native.distributed.vocabulary.choice import choose_rows
from pullback.backends.native.distributed.vocabulary.cost import rows_bytes
from pullback.backends.native.models.lora import add_lora
from pullback.cli import main
from pullback.errors import ConfigError, UnsupportedError
from pullback.ops import Head, head_logits, logprob_surrogate, selected_logprobs
from pullback.ops.own_positions import Positions, exchange_bytes
from pullback.testing import TinyLM, example_datums, random_llama

pytest.importorskip("transformers", reason="the models are those of transformers (extra hf)")
pytest.importorskip("peft", reason="adapters are those of peft (extra hf)")
pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this build of PyTorch has no torch.distributed"
)
Found = dict[str, Any]
EXACT = 1e-10


def found_by(folder: Path, ranks: int, what: str) -> list[Found]:
    run_ranks(Path(vocabulary_ranks.__file__), str(folder), what, ranks=ranks, seconds=900)
    return reports(folder, ranks)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((2, "few"), marks=pytest.mark.slow),
        pytest.param((2, "whole"), marks=pytest.mark.soak),
        pytest.param((4, "whole"), marks=pytest.mark.soak),
    ],
    ids=["2 few", "2", "4"],
)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    """What each process has found; one launch."""
    return found_by(tmp_path_factory.mktemp("vocabulary"), *request.param)


def require_one_process(case: Found) -> None:
    worst = max(case, key=lambda name: case[name])
    assert case[worst] <= EXACT, f"{worst} is {case[worst]} off"


def test_one_process(ranks: list[Found]) -> None:
    """Log-probs, gradients before the step, norms, moments, and weights after three clipped steps."""
    names = {name_of(*case) for case in CASES} & set(ranks[0])
    assert names >= {name_of(*case) for case in FEW}
    for found in ranks:
        for name in names:
            require_one_process(found[name])


def test_replicas_and_ranks_without_rows(ranks: list[Found]) -> None:
    """On four: two replicas of two shards, and a vocabulary of three parts; without the replicas' sum it is far off."""
    if len(ranks) < 4:
        pytest.skip("two processes have no replicas of shards")
    for found in ranks:
        for name in ("replicas, full", "replicas, shaped", "few rows"):
            require_one_process(found[name])
        wrong = found["replicas, not reduced"]
        assert wrong["gradient weight"] > 1e-2
        assert max(value for name, value in wrong.items() if name.startswith("gradient trunk")) < EXACT


def test_cotangents_of_one_rank_are_not_enough(ranks: list[Found]) -> None:
    """The control: a rank that goes back with those of its own positions has another gradient of its rows."""
    for found in ranks:
        assert found["control"]["gradient weight"] > 1e-2


def test_bytes(ranks: list[Found]) -> None:
    """What the head receives in a call is what was planned, to the byte, dummies and temperatures included; so are shards."""
    cases = [name for name in ranks[0] if name.startswith("bytes, ")]
    assert cases
    for found in ranks:
        for name in cases:
            assert found[name]["counted"] == found[name]["planned"] > 0
            assert found[name]["held"] <= found[name]["weights"]
    for name in cases:
        rows = [found[name]["rows"] for found in ranks]
        assert sum(rows) == 25
        assert max(rows) == -(-25 // len(ranks))


def test_what_needs_the_whole_head(ranks: list[Found]) -> None:
    """Sampling and the reference of full tuning are those of one process; what cannot be is refused in words, on every rank."""
    for found in (each["whole again"] for each in ranks):
        assert found["sampled alike"]
        assert found["reference"] < EXACT
        assert found["gather_weights"].startswith("UnsupportedError: the head is cut over the processes")
        assert "its head is its embedding too" in found["tied"]
        assert found["auto, tied"] == ""
        assert found["not the same"].startswith(
            "RanksDifferError: TorchBackend: rank 1 was given another choice of settings"
        )


def test_a_failure_on_one_rank_is_everybodys(ranks: list[Found]) -> None:
    for found in ranks:
        for name in (name for name in found if name.startswith("failing")):
            assert "ValueError: no such reward" in found[name]["error"]
            assert found[name]["moved"] == 0.0
            assert found[name]["next"] < EXACT


def test_checkpoints_move(ranks: list[Found]) -> None:
    """Saved in parts and loaded on one process, and the reverse; moments count."""
    if "moved" not in ranks[0]:
        pytest.skip("in the long proofs")
    for found in ranks:
        require_one_process(found["moved"])


def test_alone_it_is_no_choice() -> None:
    """On one process there is nothing to cut: the result is that of the default."""
    data = example_datums([4, 3])
    gradients = []
    for cut in (True, "auto"):
        backend = TorchBackend(TinyLM(), mesh=None, vocab_parallel=cut)
        backend.forward_backward(data, "ppo").result()
        gradients.append(backend.gradients())
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[1])


def lora(target: str) -> Any:
    from pullback.backends.native import HFModel

    return HFModel(add_lora(random_llama(tie_word_embeddings=False), {"r": 2, "target_modules": ["q_proj", target]}))


def test_choice() -> None:
    """By memory: just above and just below an eighth; and which heads can be cut, with and without being asked."""
    untied = TinyLM()
    size = 2 * untied.unembedding.numel() * 8  # with its gradient
    assert choose_rows("auto", untied, None, 8 * size, True) == (None, None)
    assert choose_rows("auto", untied, None, 8 * size - 1, True)[0] is not None
    frozen = TinyLM()
    frozen.unembedding.requires_grad_(False)
    assert choose_rows("auto", frozen, None, 4 * size, True) == (None, None)
    assert choose_rows("auto", frozen, None, 4 * size - 1, True)[0] is not None
    assert choose_rows(False, untied, None, 0, True) == (None, None)
    assert None not in choose_rows(True, untied, TinyLM(seed=1), 1e12, True)
    refused: list[tuple[Any, Any, bool, str]] = [
        (TinyLM(tied=True), None, True, "of this model: its head is its embedding too"),
        (untied, TinyLM(tied=True), True, "of this reference: its head is its embedding too"),
        (frozen, None, False, "shard_frozen=False leaves frozen weights whole"),
        (lora("lm_head"), None, True, "an adapter is on it"),
    ]
    for model, reference, shard_frozen, words in refused:
        assert choose_rows("auto", model, reference, 0, shard_frozen) == (None, None)
        with pytest.raises(UnsupportedError, match=words):
            choose_rows(True, model, reference, 0, shard_frozen)
    assert choose_rows(True, untied, None, 0, False)[0] is not None  # trained, and so it is spread
    assert choose_rows(True, lora("v_proj"), None, 0, True)[0] is not None
    with pytest.raises(ConfigError, match="vocab_parallel must be auto, True or False, got 2"):
        choose_rows(2, untied, None, 0, True)  # type: ignore[arg-type]


def test_rows_are_not_taken_for_the_whole() -> None:
    """What needs all logits refuses a head of which this process has a part."""
    part: Any = object()
    head, hidden = Head(torch.zeros(3, 2), group=part), torch.zeros(1, 2)
    targets = torch.zeros(1, dtype=torch.int64)
    for work in (
        lambda: head_logits(hidden, head),
        lambda: selected_logprobs(hidden, head, targets),
        lambda: logprob_surrogate(hidden, head, targets, torch.ones(1)),
    ):
        with pytest.raises(UnsupportedError, match="this process has 3 rows of the head"):
            work()


@given(
    counts=st.lists(st.integers(0, 50), min_size=2, max_size=8),
    width=st.integers(1, 64),
    k=st.integers(1, 4),
    sizes=st.sampled_from([(2, 2), (4, 4), (8, 8)]),
)
def test_bytes_by_hand(counts: list[int], width: int, k: int, sizes: tuple[int, int]) -> None:
    """The formula for ranks that score positions of one kind, and that a second kind costs one more question."""
    n, most, total, wide = len(counts), max(counts), sum(counts), max(4, sizes[1])
    forward = 48 + 120 + sizes[0] * width * most + 8 * most * k + 16 * total * (3 + k) / n
    backward = wide * most * k + 2 * wide * total * width / n
    ranks = [Positions(count, k) for count in counts]
    assert exchange_bytes(ranks, width, *sizes, backward=False) == pytest.approx((n - 1) * forward)
    assert exchange_bytes(ranks, width, *sizes) == pytest.approx((n - 1) * (forward + backward))
    other = [*ranks[:-1], Positions(counts[-1], k, 0.7)]
    assert exchange_bytes(other, width, *sizes) - exchange_bytes(ranks, width, *sizes) == pytest.approx(120 * (n - 1))


def test_paper(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A plan of a head in parts: its rows are never gathered, and their gradients never reduced; memory by hand."""
    config = random_llama(tie_word_embeddings=False, vocab_size=510).config
    hidden, head = config.hidden_size, 4 * 510 * config.hidden_size
    whole, cut = (plan_training(config, Placement(4), tokens=32, vocab_parallel=each) for each in (False, True))
    padded = 4 * 512 * hidden  # 128 rows on each rank
    assert whole.memory.gathered_weights - cut.memory.gathered_weights == padded
    assert whole.memory.gathered_gradients - cut.memory.gathered_gradients == padded
    assert whole.memory.resting == cut.memory.resting
    assert (
        whole.traffic.gathers - cut.traffic.gathers
        == whole.traffic.reductions - cut.traffic.reductions
        == padded * 3 / 4
    )
    assert cut.traffic.head == exchange_bytes([Positions(32)] * 4, hidden, 4, 4)
    assert whole.traffic.head == 0
    assert cut.memory.head == rows_bytes([[32] * 4], 0, hidden, 128, 4, trained=True, gpu=True)
    own, every, chunk, gradient = 2 * 4 * 32 * hidden, 4 * 128 * hidden, 4 * 128 * 128, 4 * 128 * hidden
    assert cut.memory.head == own + 2 * every + chunk + gradient
    assert cut.memory.head < whole.memory.head + head
    alone = [plan_training(config, Placement(), tokens=32, vocab_parallel=each) for each in (False, True)]
    assert alone[0] == alone[1]
    replicated = plan_training(config, Placement(4, 2), tokens=32, vocab_parallel=True)
    assert replicated.traffic.replicas == plan_training(config, Placement(4, 2), tokens=32).traffic.replicas
    (tmp_path / "config.json").write_text(config.to_json_string())
    words = ["plan", "--model", str(tmp_path), "--ranks", "4", "--tokens", "32", "--reshard", "false", "--json"]
    assert main([*words, "--vocab-parallel"]) == 0
    assert json.loads(capsys.readouterr().out) == cut.to_json()
    for tied, adapter in ((True, None), (False, {"r": 2, "target_modules": ["q_proj", "lm_head"]})):
        outline = random_llama(tie_word_embeddings=tied).config
        with pytest.raises(UnsupportedError, match="cannot cut this head"):
            plan_training(outline, Placement(2), tokens=8, lora=adapter, vocab_parallel=True)
