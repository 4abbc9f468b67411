"""VerlEngineBackend on verl's own FSDP engine: the gradients and steps of a TorchBackend, on one process and on two."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from pullback.backends import AdamParams
from pullback.datums import Datum, ModelInput
from pullback.errors import (
    BackendError,
    CheckpointError,
    ConfigError,
    InvalidDatumsError,
    MissingReferenceError,
    NonFiniteError,
    UnsupportedError,
)
from pullback.testing import PROMISES, BackendUnderTest, backend_report

REASON = "needs verl: make trainers TRAINERS=verl"
pytest.importorskip("verl", reason=REASON)
pytestmark = pytest.mark.filterwarnings("ignore")  # of verl, and of what it imports
import verl_tiny as tiny  # noqa: E402

from pullback.backends.verl import VerlEngineBackend  # noqa: E402

WORKER = Path(__file__).parent / "workers" / "verl_engine_worker.py"
STEP = AdamParams(learning_rate=1e-2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model, and a process group of this process alone, as verl needs one."""
    path = tmp_path_factory.mktemp("verl")
    dist.init_process_group("gloo", init_method=f"file://{path / 'store'}", rank=0, world_size=1)
    yield tiny.write_model(path / "model")
    dist.destroy_process_group()


def make(folder: Path, trained: tiny.Trained = "full", **options: Any) -> VerlEngineBackend:
    return VerlEngineBackend(tiny.tiny_engine(folder, trained, **options), checkpoint_dir=folder / "checkpoints")


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
    plugin = {"VERL_USE_EXTERNAL_MODULES": "verl_cpu", "VERL_PLATFORM": "cpu", "VERL_ENGINE_DEVICE": "cuda"}
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


def test_other_targets_are_refused(folder: Path) -> None:
    """In words that name the datum and token, in the plan too; nothing has accumulated."""
    backend = make(folder)
    data = [Datum(ModelInput.from_ints([1, 2, 3, 4]), {"target_tokens": [2, 3, t, 5]}) for t in (4, 9)]
    with pytest.raises(UnsupportedError, match="datum 1: target token 2 is 9") as caught:
        backend.forward_backward_custom(data, tiny.odd_gap).result()
    assert str(caught.value) == backend.plan(tiny.odd_gap, data).reason
    many = Datum(ModelInput.from_ints([1, 2]), {"target_tokens": torch.ones(2, 3, dtype=torch.int64)})
    with pytest.raises(UnsupportedError, match="datum 0: has 3 targets"):
        backend.forward_backward_custom([many], tiny.odd_gap).result()
    assert backend.gradients() == {}
    plan = backend.plan(tiny.odd_gap, data[:1])  # the control
    assert (plan.route, plan.recomputed) == ("two_passes", 5)
    assert "second forward" in plan.reason


def test_engines_are_refused(folder: Path) -> None:
    """An auxiliary loss that would be dropped, another optimizer, FSDP1, a scaled loss, no size of a micro-batch."""
    with pytest.raises(UnsupportedError, match="auxiliary loss"):
        make(folder, hf={"output_router_logits": True})
    engine = tiny.tiny_engine(folder, "full")
    for name, value, words in [
        ("optimizer", torch.optim.SGD(engine.module.parameters(), lr=0.1), "SGD"),
        ("module", torch.nn.Linear(1, 1), "FSDP2"),
        ("scaler", object(), "float16"),
    ]:
        kept = getattr(engine, name)
        setattr(engine, name, value)
        with pytest.raises(UnsupportedError, match=words):
            VerlEngineBackend(engine)
        setattr(engine, name, kept)
    with pytest.raises(ConfigError, match="micro_batch_size_per_gpu"):
        make(folder, micro_batch_size_per_gpu=None)
    VerlEngineBackend(engine)  # the control


def test_long_texts_are_refused(folder: Path) -> None:
    """A sequence and its last target must fit into a micro-batch, and into the context."""
    small = make(folder, use_dynamic_bsz=True, max_token_len_per_gpu=9)
    small.forward(tiny.next_token_datums((8,))).result()
    with pytest.raises(InvalidDatumsError, match="9"):
        small.forward(tiny.next_token_datums((9,))).result()
    with pytest.raises(InvalidDatumsError, match="65"):
        make(folder).forward(tiny.next_token_datums((65,))).result()


def test_not_finite(folder: Path) -> None:
    """What verl would skip with a printed line raises; the weights and the gradients are what they were."""
    backend, data = make(folder), tiny.next_token_datums()
    backend.forward_backward(data, "cross_entropy").result()
    before, kept = tiny.weights(backend), backend.gradients()
    name, p = next(iter(backend._engine.accumulator.parameters.items()))  # type: ignore[attr-defined]
    for value, words in [(float("nan"), f"gradient of {name} is not finite"), (1e30, "norm of the gradient is inf")]:
        whole = p.grad.to_local().clone()
        p.grad.to_local()[0, 0] = value
        with pytest.raises(NonFiniteError, match=words):
            backend.optim_step(STEP).result()
        p.grad.to_local().copy_(whole)
    assert all(torch.equal(x, before[n]) for n, x in tiny.weights(backend).items())
    assert all(torch.equal(x, kept[n]) for n, x in backend.gradients().items())
    assert backend.optim_step(STEP).result().stepped


class _FailingBackward(torch.autograd.Function):
    """The identity, which fails on the way back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no memory")


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_failed_pass_leaves_gradients(folder: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """verl clears the gradients when a pass fails; those of earlier calls are there all the same, and it goes on."""
    backend, data = make(folder), tiny.next_token_datums()
    backend.forward_backward(data, "cross_entropy").result()
    kept = backend.gradients()
    mlp = backend._engine.verl.module.model.layers[0].mlp  # type: ignore[attr-defined]
    original = mlp.forward

    def fail(x: Any) -> Any:
        if where == "forward" and torch.is_grad_enabled():
            raise RuntimeError("no memory")
        return _FailingBackward.apply(original(x))  # type: ignore[no-untyped-call]

    monkeypatch.setattr(mlp, "forward", fail)
    backend.forward(data).result()  # the pass that scores still runs
    with pytest.raises(RuntimeError, match="no memory"):
        backend.forward_backward(data, "cross_entropy").result()
    monkeypatch.undo()
    assert all(torch.equal(x, kept[n]) for n, x in backend.gradients().items())
    assert set(backend.gradients()) == set(kept)
    backend.forward_backward(data, "cross_entropy").result()
    assert all(torch.allclose(x, 2 * kept[n], rtol=1e-5, atol=1e-5) for n, x in backend.gradients().items())


def test_a_step_that_failed_half_way(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing runs any more but loading."""
    backend, data = make(folder), tiny.next_token_datums()
    path = backend.save_state("whole", overwrite=True).result().path
    backend.forward_backward(data, "cross_entropy").result()
    monkeypatch.setattr(backend._engine.verl, "optimizer_step", lambda: 1 / 0)  # type: ignore[attr-defined]
    with pytest.raises(ZeroDivisionError):
        backend.optim_step(STEP).result()
    monkeypatch.undo()
    with pytest.raises(BackendError, match="half-way"):
        backend.forward(data).result()
    backend.discard_gradients()
    backend.load_state_with_optimizer(path).result()
    backend.forward(data).result()


@pytest.mark.parametrize("trained", ["full", "lora"])
def test_resumes(folder: Path, trained: tiny.Trained) -> None:
    """By verl's own checkpoints: the next step is the uninterrupted one, and a cold optimizer makes another."""
    backend, data = make(folder, trained), tiny.next_token_datums()

    def train() -> dict[str, torch.Tensor]:
        backend.forward_backward(data, "cross_entropy").result()
        backend.optim_step(STEP).result()
        return tiny.weights(backend)

    first = backend.save_state("first", overwrite=True).result().path
    cold = train()
    path, before = backend.save_state("resume", overwrite=True).result().path, tiny.weights(backend)
    exact = train()
    backend.load_state_with_optimizer(path).result()
    assert backend.weights_version == 1
    assert all(torch.equal(x, before[n]) for n, x in tiny.weights(backend).items())
    assert all(torch.equal(x, exact[n]) for n, x in train().items())
    backend.load_state(path).result()
    assert all(torch.equal(x, before[n]) for n, x in tiny.weights(backend).items())
    assert not all(torch.allclose(x, exact[n], atol=1e-4) for n, x in train().items())
    backend.load_state(first).result()
    assert all(torch.equal(x, cold[n]) for n, x in train().items())  # as with an optimizer that has seen nothing


def test_checkpoints_that_are_refused(folder: Path) -> None:
    """One that exists, a name that is a path, accumulated gradients, a folder of something else, another number of ranks."""
    backend, data = make(folder), tiny.next_token_datums()
    path = Path(backend.save_state("one", overwrite=True).result().path)
    for name in ("one", "../one", ".one"):
        with pytest.raises(CheckpointError):
            backend.save_state(name).result()
    (folder / "empty").mkdir(exist_ok=True)
    with pytest.raises(CheckpointError, match="no checkpoint of this backend"):
        backend.load_state(folder / "empty").result()
    manifest = path / "pullback.json"
    manifest.write_text(manifest.read_text().replace('"ranks": 1', '"ranks": 3'))
    with pytest.raises(CheckpointError, match="3 processes"):
        backend.load_state(path).result()
    backend.forward_backward(data, "cross_entropy").result()
    with pytest.raises(UnsupportedError, match="no accumulated gradients"):
        backend.save_state("two").result()


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
