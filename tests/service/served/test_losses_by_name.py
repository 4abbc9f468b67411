"""The protocol's losses by their names at the service: values, thresholds, and what is refused in words."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import tinker
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import KEY, SDK_WARNINGS
from tinker import types

from pullback.datums import Datum, ModelInput
from pullback.errors import ConfigError, InvalidDatumsError
from pullback.service.training.provenance import with_provenance
from pullback.service.wire.protobuf import GradientRequest, message
from pullback.service.wire.provenance import Provenance

pytestmark = SDK_WARNINGS
TOKENS, TARGETS = [1, 2, 3, 4, 5], [2, 3, 4, 5, 6]
SAMPLED = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0])
ADVANTAGES = torch.tensor([0.0, 0.0, 1.0, -2.0, 0.5])
# The rollout policy is not the trained one, so that no ratio is 1; a prompt has no log-probs of it.
DRIFT = torch.tensor([0.0, 0.0, 0.4, -0.9, 0.05])


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Any]:
    """One client for all: no test steps, so that the trained policy stays what it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINKER_TELEMETRY", "0")
        with tinker.ServiceClient(base_url=url, api_key=KEY) as service:
            yield service.create_lora_training_client("tiny", rank=2, seed=3).result()


@pytest.fixture(scope="module")
def current(client: Any) -> torch.Tensor:
    """The trained policy's log-probs, fp64 [T]."""
    inputs = {"target_tokens": torch.tensor(TARGETS), "weights": torch.ones(5)}
    datum = types.Datum(model_input=types.ModelInput.from_ints(TOKENS), loss_fn_inputs=inputs)
    output = client.forward([datum], "cross_entropy").result().loss_fn_outputs[0]["logprobs"]
    return torch.as_tensor(output.to_torch()).double()


def spans(sampled: torch.Tensor) -> list[Any]:
    """Return the provenance of a prompt and what was sampled after it."""
    prompt, drawn = int((sampled == 0).sum()), int((sampled != 0).sum())
    return [
        types.PromptProvenanceSpan(sequence_id="s", length=prompt),
        types.SampledProvenanceSpan(sequence_id="s", length=drawn),
    ]


def sdk_datum(current: torch.Tensor, provenance: bool = True, **changed: Any) -> Any:
    """Return a datum as a recipe sends it, which has no ``weights``."""
    inputs = {
        "target_tokens": torch.tensor(TARGETS),
        "logprobs": ((current + DRIFT) * SAMPLED).float(),
        "advantages": ADVANTAGES,
        **changed,
    }
    given = {key: value for key, value in inputs.items() if value is not None}
    datum = types.Datum(model_input=types.ModelInput.from_ints(TOKENS), loss_fn_inputs=given)
    return datum.with_provenance(spans(SAMPLED), spans(SAMPLED)) if provenance else datum


def loss_of(client: Any, datum: Any, name: str, config: Any = None) -> float:
    return float(client.forward_backward([datum], name, config).result().metrics["loss:sum"])


def wanted(name: str, low: float, high: float, beta: float, current: torch.Tensor) -> float:
    """Return the loss by its definition, token by token."""
    rows = [
        (x, -d, a)
        for x, d, a, s in zip(current.tolist(), DRIFT.tolist(), ADVANTAGES.tolist(), SAMPLED.tolist(), strict=True)
        if s
    ]
    mean, total = sum(drift for _, drift, _ in rows) / len(rows), 0.0
    for logprob, log_ratio, advantage in rows:
        ratio = math.exp(mean if name == "gspo" else log_ratio)
        clipped = min(max(ratio, low), high)
        pessimistic = -min(ratio * advantage, clipped * advantage)
        total += {
            "importance_sampling": -ratio * advantage,
            "ppo": pessimistic,
            "gspo": pessimistic,
            "cispo": -clipped * advantage * logprob,
            "dro": beta / 2 * log_ratio**2 - advantage * logprob,
        }[name]
    return total


@pytest.mark.parametrize(("low", "high"), [(0.8, 1.2), (0.3, 3.0)])
@pytest.mark.parametrize("name", ["importance_sampling", "ppo", "cispo", "gspo", "dro"])
def test_each_has_the_value_of_its_definition(
    client: Any, current: torch.Tensor, name: str, low: float, high: float
) -> None:
    """Sums over the sampled tokens, thresholds being ratios, from datums without weights, by their provenance."""
    thresholds = {"clip_low_threshold": low, "clip_high_threshold": high}
    config = {"importance_sampling": None, "dro": {"beta": 0.3}}.get(name, thresholds)
    found = loss_of(client, sdk_datum(current), name, config)
    assert found == pytest.approx(wanted(name, low, high, 0.3, current), rel=1e-5)


@pytest.mark.parametrize("name", ["dro", "gspo"])
def test_weights_that_are_given_count(client: Any, current: torch.Tensor, name: str) -> None:
    """Provenance only fills in; without both the loss is refused, as a prompt would be part of it."""
    weights = SAMPLED * torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0])
    by_weights = loss_of(client, sdk_datum(current, weights=weights), name)
    assert by_weights == pytest.approx(loss_of(client, sdk_datum(current, provenance=False, weights=weights), name))
    assert by_weights != pytest.approx(loss_of(client, sdk_datum(current), name), rel=1e-3)
    with pytest.raises(tinker.RequestFailedError, match="missing required field"):
        loss_of(client, sdk_datum(current, provenance=False), name)


REFUSED: list[tuple[dict[str, Any], Any, str]] = [
    ({"provenance": False}, None, "with_provenance"),
    ({"advantages": None}, None, "missing required field 'advantages'"),
    ({"logprobs": None}, None, "missing required field 'logprobs'"),
    ({"advantages": torch.ones(5)}, None, "target 0 has an advantage, but was not sampled"),
    ({}, {"clip_high_threshold": 2.0}, "no config key 'clip_high_threshold'"),
    ({}, {"kl_coeff": -1.0}, "kl_coeff"),
    ({}, {"kl_coeff": "much"}, "kl_coeff"),
    ({}, {"kl_coeff": 0.1}, "its formula is not public"),
    ({}, None, "its formula is not public"),
]


@pytest.mark.parametrize(("change", "config", "words"), REFUSED)
def test_stable_reinforce_is_checked_and_then_refused(
    client: Any, current: torch.Tensor, change: dict[str, Any], config: Any, words: str
) -> None:
    """Whatever is wrong with its inputs comes first; where nothing is, the reason. Training goes on."""
    with pytest.raises(tinker.RequestFailedError, match=words) as error:
        loss_of(client, sdk_datum(current, **change), "stable_reinforce", config)
    assert error.value.category.value == "user"
    assert math.isfinite(loss_of(client, sdk_datum(current), "ppo"))


@settings(deadline=None)
@given(
    runs=st.lists(st.tuples(st.booleans(), st.integers(0, 4)), min_size=1, max_size=5),
    short=st.integers(0, 2),
    loss=st.sampled_from(["dro", "gspo", "stable_reinforce", "ppo"]),
)
def test_runs_must_cover_every_token_once(runs: list[tuple[bool, int]], short: int, loss: str) -> None:
    """Fitting provenance marks exactly the sampled targets; where it falls short, the losses that read it refuse it."""
    length = sum(size for _, size in runs) + short
    if length == 0:
        return
    span = message("Span")
    written = [
        span(**{"sampled_tokens" if drawn else "prompt_tokens": {"sequence_id": "s", "length": n}}) for drawn, n in runs
    ]
    inputs = {"target_tokens": [1] * length, "logprobs": [-1.0] * length, "advantages": [0.0] * length}
    datum = Datum(ModelInput.from_ints([1] * length), inputs)
    request = GradientRequest(
        "m", 1, b"", loss, {}, False, False, lambda: [datum], lambda: [Provenance.of(written, written)]
    )
    if short and loss != "ppo":
        with pytest.raises(InvalidDatumsError, match=f"covers {length - short} tokens of {length}"):
            with_provenance(request, [datum])
        return
    (found,) = with_provenance(request, [datum])
    if loss in ("dro", "gspo"):
        marks = [float(drawn) for drawn, n in runs for _ in range(n)]
        assert found.loss_fn_inputs["weights"].to_torch().tolist() == marks
    else:
        assert found is datum


def test_a_config_that_could_not_be_used_is_refused_without_data() -> None:
    """Both sides of the bound."""
    for value, good in ((0.0, True), (-1e-9, False), (float("inf"), False), (float("nan"), False), (True, False)):
        request = GradientRequest("m", 1, b"", "stable_reinforce", {"kl_coeff": value}, False, False, list)
        if good:
            assert with_provenance(request, []) == []
        else:
            with pytest.raises(ConfigError, match="kl_coeff"):
                with_provenance(request, [])


@pytest.mark.parametrize("key", ["clip_low_threshold", "clip_high_threshold"])
def test_thresholds_of_single_tokens_are_refused(client: Any, current: torch.Tensor, key: str) -> None:
    """The protocol knows them, and no loss here does: the refusal says so, and what takes their place."""
    datum = sdk_datum(current)
    datum.loss_fn_inputs[key] = tinker.TensorData.from_torch(torch.full((5,), 0.9))
    with pytest.raises(
        tinker.RequestFailedError, match=f"datum 0: {key} for single tokens is not supported .* loss_fn_config"
    ):
        loss_of(client, datum, "ppo")
    assert loss_of(client, sdk_datum(current), "ppo", {key: 0.9 if "low" in key else 1.1})
