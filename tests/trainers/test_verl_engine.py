"""VerlEngineBackend on verl's own FSDP engine: the gradients and steps of a TorchBackend, on one process and on two."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from many_ranks.ranks import run_ranks

from pullback.backends import AdamParams
from pullback.errors import MissingReferenceError, UnsupportedError
from pullback.testing import PROMISES, BackendUnderTest, backend_report

REASON = "needs verl: make trainers TRAINERS=verl"
pytest.importorskip("verl", reason=REASON)
pytestmark = pytest.mark.filterwarnings("ignore")  # of verl, and of what it imports
from other_trainers import verl_tiny as tiny  # noqa: E402
from other_trainers.verl_tiny import make  # noqa: E402

from pullback.backends.verl import VerlEngineBackend  # noqa: E402

WORKER = Path(__file__).parent / "workers" / "verl_engine_worker.py"
STEP = AdamParams(learning_rate=1e-2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with tiny.lone_process(tmp_path_factory.mktemp("verl")) as path:
        yield path


@pytest.mark.parametrize("loss", tiny.LOSSES)
@pytest.mark.parametrize("trained", ["full", "lora"])
def test_equals_torch(folder: Path, trained: tiny.Trained, loss: str) -> None:
    """Log-probs, gradients, divisor, clipped norm and updated weights."""
    tiny.compare(make(folder, trained), tiny.same_model(folder, trained), tiny.next_token_datums(), loss)


@pytest.mark.parametrize(
    "options",
    [
        {"use_dynamic_bsz": True, "max_token_len_per_gpu": 20, "micro_batch_size_per_gpu": None},
        {"micro_batch_size_per_gpu": 3},
        {"reshard_after_forward": False},
        {"hf": {"attention_dropout": 0.5}},
    ],
)
def test_however_the_engine_is_set(folder: Path, options: dict[str, Any]) -> None:
    """Batches by tokens, with dummies, weights that stay gathered, and a model that has a dropout."""
    ours, theirs, data = make(folder, **options), tiny.same_model(folder, "full"), tiny.next_token_datums()
    for _ in range(2):
        tiny.compare(ours, theirs, data, "dpo")
    tiny.add(ours, data, "dpo")
    before = ours.forward(data).result().loss_fn_outputs[0]["logprobs"].to_torch()  # may leave weights gathered
    ours.optim_step(STEP).result()
    after = ours.forward(data).result().loss_fn_outputs[0]["logprobs"].to_torch()
    assert float((after - before).abs().max()) > 1e-3
    tiny.add(theirs, data, "dpo")
    theirs.optim_step(STEP).result()
    known = theirs.forward(data).result().loss_fn_outputs[0]["logprobs"].to_torch()
    assert torch.allclose(after, known, atol=1e-4)


def test_two_processes(tmp_path: Path) -> None:
    """All of it on two, with a process that has no datum, and what processes must agree on."""
    tiny.write_model(tmp_path / "model")
    run_ranks(WORKER, str(tmp_path), ranks=2)


def test_the_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its script runs as it is, with the platform as a plugin of verl's."""
    folder, script = (
        tiny.write_model(tmp_path / "model"),
        WORKER.parents[3] / "examples" / "trainers" / "verl_engine.py",
    )
    plugin = {
        "VERL_USE_EXTERNAL_MODULES": "other_trainers.verl_cpu",
        "VERL_PLATFORM": "cpu",
        "VERL_ENGINE_DEVICE": "cuda",
    }
    for name, value in plugin.items():
        monkeypatch.setenv(name, value)
    written = "\n".join(run_ranks(script, str(folder), "--attention", "sdpa", "--steps", "8"))
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in written.splitlines() if line.startswith("step ")]
    assert len(losses) == 8
    assert abs(losses[0] - 0.6931) < 1e-3  # log 2: nothing has been learned
    assert losses[-1] < losses[0] - 0.01


def test_temperatures(folder: Path) -> None:
    """Each sequence is scored at that of its sampler; fused kernels take one, so that another is refused."""
    hot, cold = tiny.next_token_datums(temperature=0.7)[:4], tiny.next_token_datums()[4:]
    tiny.compare(make(folder), tiny.same_model(folder, "full"), hot + cold, "cross_entropy")
    engine = tiny.tiny_engine(folder, "full")
    object.__setattr__(engine.model_config, "use_fused_kernels", True)
    engine.infer_batch = lambda batch: None  # they need a GPU
    with pytest.raises(UnsupportedError, match=r"datums \[0, 1, 2, 3\]"):
        VerlEngineBackend(engine).forward(hot + cold).result()


# Other targets than the next tokens, K of them, and samples.
NOT_SUPPORTED = {
    "candidates_are_scored",
    "candidates_train_like_single_targets",
    "masked_inputs_are_ignored",
    "negative_weights_are_kept",
    "samples_carry_the_policys_log_probs",
    "sampling_seeds_repeat",
    "scoring_adds_no_gradient",
}


def test_conformance(folder: Path, tmp_path: Path) -> None:
    """The whole suite, with a TorchBackend as the reference: nothing fails, and what is refused is what verl cannot compute."""
    numbers = itertools.count()

    def fresh() -> VerlEngineBackend:
        engine = tiny.tiny_engine(folder, "full")
        return VerlEngineBackend(engine, checkpoint_dir=tmp_path / str(next(numbers)))

    under_test = BackendUnderTest(fresh, reference=lambda: tiny.same_model(folder, "full"), reference_trains=True)
    report = backend_report(under_test, PROMISES.values())
    assert [str(result.sentence) for result in report.failed] == []
    refused = {result.check for result in report.results if result.verdict == "not supported"}
    assert refused == NOT_SUPPORTED
    assert sum(result.verdict == "passed" for result in report.results) >= 34


def test_the_reference_of_an_adapter(folder: Path) -> None:
    """Is the model without it, as in a TorchBackend; full tuning has none."""
    data = tiny.next_token_datums()
    found, exact = (
        b.reference().forward(data).result() for b in (make(folder, "lora"), tiny.same_model(folder, "lora"))
    )
    for mine, known in zip(found.loss_fn_outputs, exact.loss_fn_outputs, strict=True):
        assert torch.allclose(mine["logprobs"].to_torch(), known["logprobs"].to_torch(), atol=1e-5)
    with pytest.raises(MissingReferenceError, match="ref_logprobs"):
        make(folder).reference()
