"""The remote backend against our service: one script, the same adapters as natively."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers import distance, make_data
from servers import SDK_WARNINGS, adapter, served, twin
from tiers import sampled
from torch import Tensor

from pullback.backends import AdamParams, SamplingParams, TorchBackend
from pullback.backends.remote import Capabilities
from pullback.datums import Datum, ModelInput
from pullback.errors import (
    ClosedError,
    ConfigError,
    DoubleNormalizationError,
    InvalidDatumsError,
    LossTypeError,
    MixedDenominatorsError,
    PrecedingOperationFailed,
    RemoteError,
    UnretrievedFailureError,
    UnsupportedError,
)
from pullback.losses import DPO, CrossEntropy

pytestmark = SDK_WARNINGS
DATA, PLAIN = make_data([6, 5, 7, 4]), Capabilities()
PARAMS = AdamParams(learning_rate=1e-2)


def confidence(data: Sequence[Any], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    return -torch.stack([x.exp().mean() for x in logprobs]).sum(), {"mine": 1.0}


def _named(*calls: tuple[str, dict[str, Any]]) -> Callable[[Any], None]:
    def script(backend: Any) -> None:
        for name, config in calls:
            backend.forward_backward(_read_by(name), name, config).result()

    return script


def _function_and_sum(backend: Any) -> None:
    backend.forward_backward_custom(DATA, confidence)
    backend.forward_backward(DATA, "ppo")


def _object(backend: Any) -> None:
    backend.forward_backward(DATA, DPO(beta=0.2))


def _counts(backend: Any) -> None:
    for part in (DATA[:1], DATA[1:]):
        backend.forward_backward(part, CrossEntropy("token_mean"), counts={"tokens": 18.0})


SCRIPTS = {
    "sum": _named(("cross_entropy", {}), ("ppo", {})),
    "sum by weights": _named(("importance_sampling", {})),
    "mean": _named(("cross_entropy", {"aggregation": "token_mean"})),
    "pairs": _named(("dpo", {"beta": 0.3})),
    "grpo": _named(("grpo", {"kl_beta": 0.1})),
    "function and sum": _function_and_sum,
    "object": _object,
    "counts": _counts,
}
WAYS: dict[str, dict[str, Any]] = {"ours": {}, "plain": {"capabilities": PLAIN}, "deferred": {"defer_backward": True}}


def _read_by(name: str) -> list[Datum]:
    unread = {"cross_entropy": ("advantages", "logprobs", "ref_logprobs"), "dpo": ("advantages", "logprobs")}
    dropped = unread.get(name, ())
    return [Datum(d.model_input, {k: v for k, v in d.loss_fn_inputs.items() if k not in dropped}) for d in DATA]


@pytest.mark.parametrize("script", sampled(SCRIPTS, ("pairs", "function and sum", "counts")))
@pytest.mark.parametrize("way", WAYS)
def test_one_script_on_both_backends(connect: Any, models: Any, script: str, way: str) -> None:
    """By name, by the client's cotangents, and held until the step: the adapters are the native ones."""
    remote = connect(**WAYS[way])
    native = twin(models, remote.trainer)
    for _ in range(2):
        for backend in (native, remote):
            SCRIPTS[script](backend)
        steps = [backend.optim_step(PARAMS).result() for backend in (native, remote)]
        assert [step.stepped for step in steps] == [True, True]
        assert steps[0].metrics["grad_norm"] == pytest.approx(steps[1].metrics["grad_norm"], rel=1e-4)
    assert distance(adapter(served(models, remote.trainer)), adapter(native)) < 1e-5
    assert remote.weights_version == native.weights_version == 2
    remote.close()


@pytest.mark.parametrize("mode", sampled(["num_loss_tokens", "num_sequences", "auto", None], ["num_sequences", "auto"]))
@pytest.mark.parametrize("parts", [[DATA], [DATA[:2], DATA[2:]]])
def test_every_normalisation_when_deferred(connect: Any, models: Any, mode: Any, parts: list[list[Datum]]) -> None:
    """Held cotangents can be divided by anything, however the data was split."""
    remote = connect(defer_backward=True)
    native = twin(models, remote.trainer)
    steps = []
    for backend in (native, remote):
        for part in parts:
            backend.forward_backward(part, "ppo").result()
        steps.append(backend.optim_step(PARAMS, mode).result())
    assert steps[0].divided_by == steps[1].divided_by
    assert steps[0].normalization == steps[1].normalization
    assert distance(adapter(served(models, remote.trainer)), adapter(native)) < 1e-5


def test_means_are_split_as_natively_where_the_service_divides(connect: Any, models: Any) -> None:
    """Our service divides once, by the accumulation's count; a plain one cannot, and that is refused before any work."""
    ours, plain = connect(), connect(capabilities=PLAIN)
    native = twin(models, ours.trainer)
    mean = {"aggregation": "token_mean"}
    for backend in (native, ours):
        for part in (DATA[:2], DATA[2:]):
            backend.forward_backward(part, "cross_entropy", mean).result()
        backend.optim_step(PARAMS).result()
    assert distance(adapter(served(models, ours.trainer)), adapter(native)) < 1e-5
    plain.forward_backward(DATA[:2], "cross_entropy", mean).result()
    with pytest.raises(UnsupportedError, match="defer_backward"):
        plain.forward_backward(DATA[2:], "cross_entropy", mean).result()
    with pytest.raises(UnsupportedError, match="defer_backward"):
        plain.forward_backward(DATA[2:], "cross_entropy").result()
    assert plain.optim_step(PARAMS).result().normalization == "cross_entropy by its own count"
    plain.forward_backward(DATA[2:], "cross_entropy").result()
    with pytest.raises(UnsupportedError, match="no normalisation"):
        plain.optim_step(PARAMS, "num_loss_tokens").result()
    plain.optim_step(PARAMS).result()
    plain.forward_backward(DATA, "cross_entropy", mean).result()
    with pytest.raises(DoubleNormalizationError, match="second time"):
        plain.optim_step(PARAMS, "num_loss_tokens").result()


def test_two_denominators_do_not_meet(connect: Any) -> None:
    """What the native accumulation refuses is refused here too, in both ways."""
    for way in ("ours", "deferred"):
        backend = connect(**WAYS[way])
        backend.forward_backward(DATA, "cross_entropy", {"aggregation": "token_mean"}).result()
        with pytest.raises(MixedDenominatorsError, match="one division"):
            backend.forward_backward(DATA, "dpo").result()
        assert backend.optim_step(PARAMS).result().stepped


def test_forward_and_sample(connect: Any, models: Any) -> None:
    """Scores and samples are the native ones."""
    remote = connect()
    native = twin(models, remote.trainer)
    plain = [Datum(ModelInput.from_ints([1, 5, 6]), {"target_tokens": [5, 6, 2]})]
    for data in (DATA, plain):
        found, wanted = (backend.forward(data).result() for backend in (remote, native))
        for one, other in zip(found.loss_fn_outputs, wanted.loss_fn_outputs, strict=True):
            torch.testing.assert_close(one["logprobs"].to_torch(), other["logprobs"].to_torch(), atol=1e-5, rtol=0)
        assert found.metrics["loss:sum"] == pytest.approx(wanted.metrics["loss:sum"], rel=1e-5)
    rollouts = remote.sample([ModelInput.from_ints([1, 2])] * 2, 3, SamplingParams(max_tokens=4, stop=[])).result()
    assert [r.prompt_index for r in rollouts] == [0, 0, 0, 1, 1, 1]
    for r in rollouts:
        whole = [1, 2, *r.tokens]
        datum = Datum(ModelInput.from_ints(whole[:-1]), {"target_tokens": whole[1:]})
        scored = native.forward([datum]).result().loss_fn_outputs[0]["logprobs"].to_torch()[1:]
        torch.testing.assert_close(torch.tensor(r.logprobs), scored, atol=1e-4, rtol=0)
    remote.forward_backward(DATA, "ppo").result()
    remote.optim_step(AdamParams(learning_rate=0.1)).result()
    assert remote.sample([ModelInput.from_ints([1])], 1, SamplingParams(max_tokens=1)).result()[0].weights_version == 1


def test_save_and_load(connect: Any, models: Any) -> None:
    """A second backend that loads the first one's checkpoint takes the same step."""
    first, second = connect(), connect()
    first.forward_backward(DATA, "ppo").result()
    first.optim_step(PARAMS).result()
    path = first.save_state("here").result().path
    second.load_state_with_optimizer(path).result()
    for backend in (first, second):
        backend.forward_backward(DATA, "ppo").result()
        backend.optim_step(PARAMS).result()
    assert distance(*(adapter(served(models, b.trainer)) for b in (first, second))) == 0.0
    with pytest.raises(RemoteError, match=r"save_state failed at the service: .*exists"):
        first.save_state("here").result()
    first.save_state("here", overwrite=True).result()
    with pytest.raises(RemoteError, match="no checkpoint"):
        second.load_state(path + "-not").result()


def test_mistakes_are_refused_before_any_byte(connect: Any) -> None:
    """Bad data and bad functions fail their own future; the backend still trains."""
    backend = connect()
    sent: list[str] = []
    trainer = backend.trainer
    backend._remote.trainer = None  # nothing may touch the service
    bad = [DATA[0].with_inputs(weights=[1.0]), DATA[1]]
    with pytest.raises(InvalidDatumsError, match="datum 0"):
        backend.forward_backward(bad, "cross_entropy").result()
    with pytest.raises(LossTypeError):
        backend.forward_backward_custom(DATA, "dpo").result()
    with pytest.raises(ConfigError, match="AdamParams"):
        backend.optim_step({"learning_rate": 1}).result()
    backend._remote.trainer = trainer

    def broken(data: Any, logprobs: Any) -> Any:
        sent.append("called")
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        backend.forward_backward_custom(DATA, broken).result()
    backend.forward_backward_custom(DATA, lambda d, lp: (lp[0].mean(), {}))
    assert backend.optim_step(PARAMS).result().stepped
    backend.close()
    with pytest.raises(ClosedError):
        backend.forward(DATA)


def test_a_window_that_lacks_a_batch_makes_no_step(connect: Any) -> None:
    """An unretrieved failure stops the step, here or at the service; at the end it is raised."""
    backend = connect()
    backend.forward_backward(DATA, "cross_entropy").result()
    failed = backend.forward_backward(DATA, "pqo")
    with pytest.raises(PrecedingOperationFailed, match="pqo"):
        backend.optim_step(PARAMS).result()
    assert failed.exception() is not None
    assert backend.optim_step(PARAMS).result().stepped
    assert not backend.optim_step(PARAMS).result().stepped  # empty
    at_service = backend.forward_backward([d.with_inputs(target_tokens=[99] * len(d.model_input)) for d in DATA], "ppo")
    with pytest.raises(PrecedingOperationFailed, match="vocabulary"):
        backend.optim_step(PARAMS).result()
    with pytest.raises(RemoteError, match="forward_backward failed at the service"):
        at_service.result()
    backend.discard_gradients()  # the service has none
    backend.forward_backward(DATA, "ppo")
    with pytest.raises(UnsupportedError, match="cannot forget"):
        backend.discard_gradients()
    backend.forward_backward(DATA, "pqo")
    with pytest.raises(UnretrievedFailureError, match="pqo"):
        backend.close()


def test_held_gradients_can_be_dropped(connect: Any, models: Any) -> None:
    """With defer_backward an accumulation is emptied without a trace."""
    backend = connect(defer_backward=True)
    before = adapter(served(models, backend.trainer))
    backend.forward_backward(DATA, "dpo").result()
    backend.discard_gradients()
    assert not backend.optim_step(PARAMS).result().stepped
    assert distance(adapter(served(models, backend.trainer)), before) == 0.0


def test_plan_says_the_way(connect: Any) -> None:
    """By name, in two halves, or not at all."""
    ours, plain = connect(), connect(capabilities=PLAIN)
    assert ours.plan("dpo", DATA).route == "native"
    assert plain.plan("dpo", DATA).route == "two_passes"
    assert plain.plan("ppo", DATA).route == "native"
    assert plain.plan(confidence, DATA).recomputed == sum(len(d.model_input) for d in DATA)
    refused = ours.plan("ppo", _read_by("cross_entropy"))
    assert refused.route == "refuse"
    assert "advantages" in refused.reason


def test_a_slow_service_says_what_it_was_waiting_for(connect: Any, models: Any, monkeypatch: Any) -> None:
    """A timeout names the operation, leaves the future alive, and says so."""
    import threading

    gate = threading.Event()
    original = TorchBackend.forward_backward

    def slow(*args: Any, **kwargs: Any) -> Any:
        gate.wait(120)
        return original(*args, **kwargs)

    backend = connect()
    monkeypatch.setattr(TorchBackend, "forward_backward", slow)
    future = backend.forward_backward(DATA, "cross_entropy")
    with pytest.raises(TimeoutError, match=r"forward_backward was sent .* is running at the service"):
        future.result(timeout=0.2)
    gate.set()
    assert future.result(timeout=120).metrics["loss:sum"] > 0
