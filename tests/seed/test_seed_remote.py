"""The published examples run as printed on a service: by the official SDK itself, and by RemoteBackend.

The result is always that of the native backend on the same model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
from helpers import distance
from seed_examples import EDITS, VOCAB, raw_sum, run, weight_datums
from servers import SDK_WARNINGS, adapter, served, tiny_models, twin
from tiers import sampled

import pullback
from pullback import AdamParams, TorchBackend
from pullback.datums import to_tinker
from pullback.errors import InvalidDatumsError, NotDifferentiableError, UnsupportedError

pytest.importorskip("tinker", reason="the examples on a service need the tinker SDK (extra remote)")
pytestmark = SDK_WARNINGS


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_models(tmp_path_factory.mktemp("checkpoints"), vocab=VOCAB)


class Side(NamedTuple):
    """A client of the service, the native backend that it must equal, and its datums and types.

    Attributes:
        native: runs the same script.
        trained: the backend behind the client.
        data: the example's datums as this client takes them.
        names: what the examples call ``tinker``.
    """

    client: Any
    native: TorchBackend
    trained: TorchBackend
    data: list[Any]
    names: dict[str, Any]


@pytest.fixture(params=sampled(["sdk", "remote", "deferred"], ["sdk", "remote"]))
def side(request: pytest.FixtureRequest, url: str, service: Any, models: Any) -> Iterator[Side]:
    """The one line that differs between the clients."""
    import tinker

    if request.param == "sdk":
        client = service.create_lora_training_client("tiny", rank=4, seed=3).result()
        own, data, names = client, to_tinker(weight_datums()), {"tinker": tinker}
        yield Side(client, twin(models, own), served(models, own), data, names)
        return
    backend = pullback.connect(
        service, base_model="tiny", rank=4, lora={"seed": 3}, defer_backward=request.param == "deferred"
    )
    own = backend.trainer
    yield Side(backend, twin(models, own), served(models, own), weight_datums(), {})
    backend.close()


def on_both(side: Side, script: Callable[[Any, list[Any], dict[str, Any]], object]) -> None:
    """Run a script here and there; afterwards the adapters are the same, and not what they were."""
    before = adapter(side.native)
    script(side.client, side.data, side.names)
    script(side.native, weight_datums(), {})
    assert distance(adapter(side.trained), adapter(side.native)) < 1e-5
    assert distance(adapter(side.native), before) > 1e-6


def step(client: Any, names: dict[str, Any]) -> None:
    """A step large enough to be seen."""
    params = names["tinker"].AdamParams if names else AdamParams
    client.optim_step(params(learning_rate=1e-2)).result()


def test_built_in_and_reference(side: Side) -> None:
    """The string loss, and the forward for reference log-probs."""
    found = [
        run("reference", training_client=c, datums=d)["ref_logprobs"]
        for c, d in ((side.client, side.data), (side.native, weight_datums()))
    ]
    assert [len(x) for x in found[0]] == [4, 3]
    for ours, native in zip(*found, strict=True):
        assert list(ours) == pytest.approx(list(native), abs=1e-5)

    def script(client: Any, data: list[Any], names: dict[str, Any]) -> None:
        result = run("built_in", training_client=client, datums=data)["result"]
        assert result.metrics["loss:sum"] > 0
        step(client, names)

    on_both(side, script)


def test_cross_entropy_closure(side: Side) -> None:
    """The example's own cross-entropy."""

    def script(client: Any, data: list[Any], names: dict[str, Any]) -> None:
        result = run("custom_losses", training_client=client, datums=data)["result"]
        assert result.metrics["cross_entropy"] > 0
        step(client, names)

    on_both(side, script)


@pytest.mark.parametrize("example", ["grpo", "dpo"])
def test_closures_with_a_reference(side: Side, example: str) -> None:
    """The example's own GRPO and DPO."""

    def script(client: Any, data: list[Any], names: dict[str, Any]) -> None:
        reference = run("reference", training_client=client, datums=data)["ref_logprobs"]
        if example == "grpo":
            made = run("grpo", compute_advantages=lambda rewards: rewards)["make_grpo_loss"](
                [1.0, -0.5], reference, 0.1
            )
        else:
            made = run("dpo")["make_dpo_loss"](*reference)
        metrics = client.forward_backward_custom(data, made).result().metrics
        assert set(metrics) >= {"loss" if example == "grpo" else "margin"}
        step(client, names)

    on_both(side, script)


def test_step_and_accumulation(side: Side) -> None:
    """The optimizer step, and several calls before one."""

    def script(client: Any, data: list[Any], names: dict[str, Any]) -> None:
        run("step", training_client=client, datums=data, loss_fn=raw_sum, **names)
        run("accumulation", training_client=client, micro_batches=[data[:1], data[1:]], loss_fn=raw_sum, **names)

    on_both(side, script)


def test_normalization(side: Side) -> None:
    """Where cotangents are held, every mode; the plain protocol has no such argument, and RemoteBackend says so."""
    if side.names:
        with pytest.raises(TypeError, match="grad_accumulation_normalization"):
            run("normalization", training_client=side.client, datums=side.data, loss_fn=raw_sum, **side.names)
        return
    if not side.client._remote.accumulator.deferred:
        with pytest.raises(UnsupportedError, match="defer_backward"):
            run("normalization", training_client=side.client, datums=side.data, loss_fn=raw_sum)
        return

    def script(client: Any, data: list[Any], names: dict[str, Any]) -> None:
        run("normalization", training_client=client, datums=data, loss_fn=raw_sum)
        for mode in ("num_sequences", None):
            client.forward_backward_custom(data, raw_sum).result()
            client.optim_step(AdamParams(learning_rate=1e-3), mode).result()

    on_both(side, script)


def test_pitfalls(side: Side) -> None:
    """RemoteBackend refuses what the examples warn of, before any byte is sent."""
    if side.names:
        pytest.skip("the SDK's client is not ours: it does not refuse these")
    short = [side.data[0].with_inputs(weights=[1.0]), side.data[1]]
    with pytest.raises(InvalidDatumsError, match="nothing is truncated"):
        side.client.forward_backward_custom(short, raw_sum).result()
    with pytest.raises(NotDifferentiableError):
        side.client.forward_backward_custom(side.data, lambda d, lp: (lp[0].detach().sum(), {})).result()
    assert side.client.forward_backward_custom(side.data, raw_sum).result().metrics["loss"] > 0
    step(side.client, side.names)


def test_the_edits_are_few() -> None:
    """Imports and literal dots, and nothing else."""
    reasons = [why for *_, why in EDITS]
    assert all(why.startswith(("import", "literal ...")) for why in reasons)
    assert len(reasons) == 4
