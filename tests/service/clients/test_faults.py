"""The official SDK, as it is, through a network that fails: what is trained is what is trained without it, bit for bit."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tinker
import torch
from clients.hurried import hurry
from helpers import make_data
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from servers import KEY, SDK_WARNINGS, adapter, served, tiny_models
from tiers import SOAK, sampled
from torch import Tensor

from pullback.datums import to_tinker
from pullback.service import ServedModels, serving
from pullback.service.http import client_config
from pullback.service.limits import Limits
from pullback.service.queueing.sequencer import Sequencer
from pullback.testing.network.faults import FAULT_KINDS, Fault, FaultyProxy, misbehaving

pytestmark = SDK_WARNINGS
PARAMS = tinker.AdamParams(learning_rate=1e-2)
START = ("client/config", "client/dynamic_config", "create_session", "create_model", "get_info", "retrieve_future")
TRAINING = ("forward_backward", "forward_backward", "optim_step", "save_weights", "retrieve_future", "retrieve_future")
FIELDS = {
    "cross_entropy": ("target_tokens", "weights"),
    "ppo": ("target_tokens", "weights", "logprobs", "advantages"),
    "importance_sampling": ("target_tokens", "weights", "logprobs", "advantages"),
}


def data(loss: str, seed: int = 0) -> list[tinker.Datum]:
    """Four sequences, in two pairs."""
    found = make_data([6, 5, 7, 4], seed)
    return to_tinker([type(d)(d.model_input, {key: d.loss_fn_inputs[key] for key in FIELDS[loss]}) for d in found])


def confidence(_: Any, logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    return -torch.stack([x.exp().sum() for x in logprobs]).sum(), {}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, ServedModels]]:
    """A service that polls and gives up soon, and whose clients cut a call into parallel requests of two sequences."""
    models = tiny_models(tmp_path_factory.mktemp("faults"))
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch)
        patch.setitem(client_config._CLIENT, "fwdbwd_max_chunk_len", 2)
        with serving(models, keys=[KEY], limits=Limits(gap_seconds=20.0, poll_seconds=0.5)) as url:
            yield url, models
    gc.collect()  # the SDK's sockets


class Side:
    """A client, and what it still waits for."""

    def __init__(self, stack: ExitStack, url: str, models: ServedModels) -> None:
        service = stack.enter_context(tinker.ServiceClient(base_url=url, api_key=KEY))
        self.client = service.create_lora_training_client("tiny", rank=2, seed=3).result()
        self.backend = served(models, self.client)
        self.waiting: list[Any] = []

    def read(self) -> list[Any]:
        """What all that was sent has given: log-probs, metrics, names."""
        found, self.waiting = [_plain(future.result(timeout=120)) for future in self.waiting], []
        return found

    def weights(self) -> Tensor:
        """What is trained, and what waits for the next step."""
        parts = [*adapter(self.backend).values(), *self.backend.gradients().values()]
        return torch.cat([part.flatten() for part in parts])


def _plain(result: Any) -> Any:
    if hasattr(result, "loss_fn_outputs"):
        return [one["logprobs"].data for one in result.loss_fn_outputs], result.metrics["loss:sum"]
    return result.metrics if hasattr(result, "metrics") else result.path.rsplit("/", 1)[1]


class Twins(RuleBasedStateMachine):
    """The same training twice, once through a proxy whose faults are drawn: results and weights are the same bits."""

    hits: ClassVar[Counter[str]] = Counter()
    runs: ClassVar[int] = 0

    def __init__(self, url: str, models: ServedModels) -> None:
        super().__init__()
        self.url, self.models, self.saves = url, models, 0
        self.stack = ExitStack()
        self.proxy: FaultyProxy = self.stack.enter_context(misbehaving(url))

    @initialize(faults=st.lists(st.tuples(st.sampled_from(START), st.sampled_from(FAULT_KINDS)), max_size=3))
    def start(self, faults: list[tuple[str, Any]]) -> None:
        for route, kind in faults:
            self.proxy.plan(route, Fault(kind))
        self.sides = [Side(self.stack, address, self.models) for address in (self.url, self.proxy.url)]

    @rule(route=st.sampled_from(TRAINING), kind=st.sampled_from(FAULT_KINDS), seconds=st.sampled_from([0.01, 0.1]))
    def misbehave(self, route: str, kind: Any, seconds: float) -> None:
        self.proxy.plan(route, Fault(kind, seconds))

    @rule(loss=st.sampled_from(sorted(FIELDS)), seed=st.integers(0, 2))
    def gradient(self, loss: str, seed: int) -> None:
        self.both(lambda client: client.forward_backward(data(loss, seed), loss))

    @rule()
    def custom(self) -> None:
        self.both(lambda client: client.forward_backward_custom(data("cross_entropy"), confidence))

    @rule()
    def look(self) -> None:
        self.both(lambda client: client.forward(data("cross_entropy"), "cross_entropy"))

    @rule()
    def step(self) -> None:
        self.both(lambda client: client.optim_step(PARAMS))

    @rule()
    def save(self) -> None:
        self.saves += 1
        self.both(lambda client: client.save_state(f"save-{self.saves}"))

    @rule()
    def read(self) -> None:
        plain, faulty = (side.read() for side in self.sides)
        assert plain == faulty

    def both(self, act: Any) -> None:
        for side in self.sides:
            side.waiting.append(act(side.client))

    def teardown(self) -> None:
        try:
            if hasattr(self, "sides"):
                self.read()
                assert torch.equal(*(side.weights() for side in self.sides))
                Twins.hits.update(one.fault.kind for one in self.proxy.exchanges if one.fault is not None)
                Twins.runs += 1
        finally:
            self.stack.close()


def test_no_fault_changes_what_is_trained(place: tuple[str, ServedModels], capsys: Any) -> None:
    """Random faults on random requests of a random training: pipelined, in parallel chunks, with custom losses."""
    shape = settings(
        max_examples=200 if SOAK else 2,
        stateful_step_count=25 if SOAK else 12,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],  # an example takes a second: shrinking would take minutes
    )

    class Here(Twins):
        def __init__(self) -> None:
            super().__init__(*place)

    run_state_machine_as_test(Here, settings=shape)
    with capsys.disabled():
        if SOAK:
            print(f"\n{Twins.runs} schedules, {Twins.hits.total()} faults: {dict(Twins.hits)}")


def trained(place: tuple[str, ServedModels], faults: dict[tuple[str, int], Fault]) -> Tensor:
    """Two steps under a schedule."""
    with misbehaving(place[0], faults) as proxy, ExitStack() as stack:
        side = Side(stack, proxy.url, place[1])
        for seed in range(2):
            side.waiting += [side.client.forward_backward(data("ppo", seed), "ppo"), side.client.optim_step(PARAMS)]
        side.read()
        return side.weights()


def everywhere(kind: Any) -> dict[tuple[str, int], Fault]:
    """A fault for every second request of every route."""
    return {(route, n): Fault(kind, 0.02) for route in {*START, *TRAINING} for n in range(1, 12, 2)}


@pytest.fixture(scope="module")
def plain(place: tuple[str, ServedModels]) -> Tensor:
    """What is trained without a fault."""
    return trained(place, {})


@pytest.mark.parametrize("kind", sampled(FAULT_KINDS, ("drop_response", "duplicate", "stall", "cut_request")))
def test_every_second_request_fails(place: tuple[str, ServedModels], plain: Tensor, kind: Any) -> None:
    """Each kind of fault alone, all the time."""
    assert torch.equal(trained(place, everywhere(kind)), plain)


@pytest.mark.parametrize("kind", ["duplicate", "drop_response"])
def test_a_service_that_runs_what_comes_again_is_caught(
    place: tuple[str, ServedModels], plain: Tensor, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: without the memory of what was accepted, the same schedules train something else."""
    submit = Sequencer.submit

    def forgetful(
        self: Any, owner: str, queue: str, number: Any, payload: bytes, what: str, work: Any, **given: Any
    ) -> str:
        known = number is not None and self._journal.numbered(queue, number) is not None
        if known and what in ("forward_backward", "optim_step"):
            number, given = None, {"ordered": False}
        return submit(self, owner, queue, number, payload, what, work, **given)

    monkeypatch.setattr(Sequencer, "submit", forgetful)
    assert not torch.equal(trained(place, everywhere(kind)), plain)


def test_an_outage_is_an_error_and_no_gap(place: tuple[str, ServedModels], monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that never reaches the service is an error; what was sent behind it is not run as if it had been."""
    outage = {("optim_step", n): Fault("drop_request") for n in range(2, 500)}
    with misbehaving(place[0], outage) as proxy, ExitStack() as stack:
        side = Side(stack, proxy.url, place[1])
        side.waiting += [side.client.forward_backward(data("ppo"), "ppo"), side.client.optim_step(PARAMS)]
        side.read()
        before = adapter(side.backend)
        side.client.forward_backward(data("ppo", 1), "ppo").result(timeout=120)
        hurry(monkeypatch, patience=3.0)
        with pytest.raises(tinker.APIConnectionError):
            side.client.optim_step(PARAMS).result(timeout=120)
        assert all(torch.equal(p, before[name]) for name, p in adapter(side.backend).items())


def test_a_wrong_fault_is_refused() -> None:
    """A misspelt kind is an error, not a network that works."""
    with pytest.raises(ValueError, match="drop_request"):
        Fault("dorp_request")  # type: ignore[arg-type]


def test_the_proxy_reports_what_it_did(place: tuple[str, ServedModels], tmp_path: Path) -> None:
    """Exchanges say what passed and what was done to it."""
    import httpx

    schedule = {("healthz", 2): Fault("drop_response"), ("healthz", 3): Fault("error")}
    with misbehaving(place[0], schedule) as proxy, httpx.Client(headers={"x-api-key": KEY}) as http:
        address = f"{proxy.url}/api/v1/healthz"
        assert http.get(address).json() == {"status": "ok"}
        with pytest.raises(httpx.TransportError):
            http.get(address)
        assert http.get(address).status_code == 503
        proxy.upstream = "http://127.0.0.1:1"  # nobody there
        with pytest.raises(httpx.TransportError):
            http.get(address)
    assert [(one.number, one.status, one.fault) for one in proxy.exchanges] == [
        (1, 200, None),
        (2, 200, Fault("drop_response")),
        (3, 0, Fault("error")),
    ]
