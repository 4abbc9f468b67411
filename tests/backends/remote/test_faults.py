"""RemoteBackend through a network that fails: a whole script trains what it trains without faults, bit for bit."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from clients.hurried import hurry
from helpers import make_data
from servers import KEY, SDK_WARNINGS, adapter, served, tiny_models
from tiers import sampled
from torch import Tensor

import pullback
from pullback.backends import AdamParams, RemoteBackend, SamplingParams, with_reference
from pullback.backends.remote import Capabilities
from pullback.backends.remote.connection import probe
from pullback.datums import Datum, ModelInput, datum_from_rollout
from pullback.errors import RemoteError
from pullback.losses import GRPO, KL
from pullback.service import ServedModels, serving
from pullback.service.limits import Limits
from pullback.testing.network.faults import FAULT_KINDS, Fault, misbehaving

pytestmark = SDK_WARNINGS
PARAMS = AdamParams(learning_rate=1e-2)
PROMPTS = [ModelInput.from_ints([1, 5, 6]), ModelInput.from_ints([2, 3])]
ROUTES = (
    *("get_server_capabilities", "client/config", "create_session", "create_model", "get_info", "retrieve_future"),
    *(
        "forward_backward",
        "optim_step",
        "save_weights",
        "load_weights",
        "save_weights_for_sampler",
        "asample",
    ),
)
GRPO_KL = GRPO(kl=KL("k3", 0.04), aggregation="token_mean")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, ServedModels]]:
    """A service that polls and gives up soon."""
    models = tiny_models(tmp_path_factory.mktemp("remote-faults"))
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch)
        patch.setattr(probe, "_PAUSES", (0.01,) * 3)
        with serving(models, keys=[KEY], limits=Limits(gap_seconds=20.0, poll_seconds=0.5)) as url:
            yield url, models
    gc.collect()  # the SDK's sockets


def confidence(_: Sequence[Datum], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    return -torch.stack([x.exp().sum() for x in logprobs]).sum(), {}


def script(backend: RemoteBackend) -> list[float]:
    """Roll out, score by the reference, three kinds of gradients, steps, save and load; return what was seen."""
    params = SamplingParams(max_tokens=5, stop=[], seed=7)
    # One prompt at a time: beside others, which a fault may delay, log-probs are others in the last bits.
    rollouts = [(g, r) for g, prompt in enumerate(PROMPTS) for r in backend.sample([prompt], 2, params).result()]
    data = [
        datum_from_rollout(PROMPTS[g].to_ints(), r.tokens, r.logprobs, 1.0 - i, group_id=g)
        for i, (g, r) in enumerate(rollouts)
    ]
    scored = with_reference(data, backend.reference())
    backend.forward_backward(scored, GRPO_KL).result()
    backend.optim_step(PARAMS).result()
    saved = backend.save_state("here", overwrite=True).result()
    pairs = make_data([6, 5, 7, 4])
    backend.forward_backward_custom(pairs, confidence)
    backend.forward_backward(pairs, "ppo")
    backend.optim_step(PARAMS)
    seen = backend.forward(pairs).result()
    backend.load_state_with_optimizer(saved.path).result()
    backend.forward_backward(pairs, "dpo").result()
    backend.optim_step(PARAMS).result()
    return [*seen.metrics.values(), *(x for _, r in rollouts for x in (*r.tokens, *r.logprobs))]


def trained(place: tuple[str, ServedModels], kind: Any, **options: Any) -> tuple[list[float], Tensor]:
    """What the script sees and trains where every second request of every route suffers a fault."""
    faults = {} if kind is None else {(route, n): Fault(kind, 0.02) for route in ROUTES for n in range(1, 40, 2)}
    with (
        misbehaving(place[0], faults) as proxy,
        pullback.connect(proxy.url, base_model="tiny", rank=2, api_key=KEY, lora={"seed": 3}, **options) as backend,
    ):
        seen = script(backend)
        weights = torch.cat([p.flatten() for p in adapter(served(place[1], backend.trainer)).values()])
        if kind is not None:
            hit = {one.route for one in proxy.exchanges if one.fault is not None}
            assert set(ROUTES) - hit == set()
    return seen, weights


@pytest.fixture(scope="module")
def plain(place: tuple[str, ServedModels]) -> tuple[list[float], Tensor]:
    """Without a fault."""
    return trained(place, None)


@pytest.mark.parametrize("kind", sampled(FAULT_KINDS, ("drop_response", "cut_request")))
def test_every_second_request_fails(
    place: tuple[str, ServedModels], plain: tuple[list[float], Tensor], kind: Any
) -> None:
    """Each kind of fault alone, all the time: rollouts, scores, gradients, steps and checkpoints are the same bits."""
    seen, weights = trained(place, kind)
    assert seen == plain[0]
    assert torch.equal(weights, plain[1])


@pytest.mark.parametrize("kind", sampled(["drop_response", "duplicate"], ["drop_response"]))
def test_held_gradients_arrive_once(
    place: tuple[str, ServedModels], plain: tuple[list[float], Tensor], kind: Any
) -> None:
    """Cotangents that wait for the step are sent once too, and train the same."""
    seen, weights = trained(place, kind, defer_backward=True)
    assert seen == pytest.approx(plain[0], rel=1e-5)
    torch.testing.assert_close(weights, plain[1], rtol=1e-4, atol=1e-6)


def test_what_a_service_can_do_is_asked_until_it_answers(place: tuple[str, ServedModels]) -> None:
    """A lost answer does not turn a service that can do more into a plain one; silence is an error, unless it was said."""
    given: dict[str, Any] = {"base_model": "tiny", "rank": 2, "api_key": KEY}
    lost = {("get_server_capabilities", n): Fault("error_after") for n in (1, 2, 3)}
    with misbehaving(place[0], lost) as proxy, pullback.connect(proxy.url, **given) as backend:
        assert backend.capabilities.divides
    lost[("get_server_capabilities", 4)] = Fault("drop_response")
    with misbehaving(place[0], lost) as proxy:
        with pytest.raises(RemoteError, match=r"asked 4 times .* give capabilities="):
            pullback.connect(proxy.url, **given)
        proxy.plan("get_server_capabilities", Fault("error"))
        with pullback.connect(proxy.url, capabilities=Capabilities(), **given) as backend:
            assert not backend.capabilities.divides
    with pytest.raises(RemoteError, match="no service answers"):
        pullback.connect("http://127.0.0.1:9", **given)
