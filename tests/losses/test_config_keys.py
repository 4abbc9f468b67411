"""Config keys: every loss travels as its keys and comes back the same; what has no effect is refused."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from example_losses.loss_inputs import DEFAULTS, VARIANTS, ids
from hypothesis import given
from hypothesis import strategies as st

from pullback.errors import ConfigError
from pullback.losses import AGGREGATIONS, GRPO, KL, Loss, get_loss, preset, preset_names, registry
from pullback.losses.config import config_keys, from_wire, to_wire
from pullback.losses.registry import config_of

# As they were before config keys were derived from the fields: no spelling of a published config may vanish or change.
PUBLISHED: dict[str, dict[str, Any]] = {
    "cross_entropy": {"aggregation": "sum"},
    "importance_sampling": {"aggregation": "sum"},
    "ppo": {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2, "aggregation": "sum"},
    "grpo": {
        "clip_low_threshold": 0.8,
        "clip_high_threshold": 1.2,
        "kl_beta": 0.0,
        "kl_estimator": "k3",
        "kl_gradient": "reverse",
        "aggregation": "token_mean",
    },
    "dpo": {"beta": 0.1, "label_smoothing": 0.0, "aggregation": "pair_mean"},
    "orpo": {"lam": 0.1, "nll": "sequence_mean", "max_prob": 1.0 - 1e-4, "aggregation": "pair_mean"},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_keys(name: str) -> None:
    """Every published key is there, with its default."""
    found = config_keys(registry.get(name))
    assert {key: found.get(key) for key in PUBLISHED[name]} == PUBLISHED[name]


MADE = [*VARIANTS, *(preset(name, **({"dro_beta": 0.1} if name == "verl:dro" else {})) for name in preset_names())]
UNNAMED = [loss for loss in MADE if AGGREGATIONS.get(loss.main_aggregation.name) != loss.main_aggregation]
NO_KEYS = [  # a part of them has no key
    preset("seed:grpo"),
    GRPO(clip=None, anchor="none"),
    GRPO(clip=None, kl=KL("k2", gradient="none")),
    GRPO(kl=KL("k3", gradient="pathwise", importance=False), aggregation="group_mean_token_mean"),
]


@pytest.mark.parametrize("loss", MADE, ids=ids(MADE))
def test_there_and_back(loss: Loss) -> None:
    """A loss that keys can build is built by its keys, which travel as JSON; from_config and get_loss build the same."""
    config = config_of(loss)
    assert (config is None) == (loss in [*UNNAMED, *NO_KEYS])
    if config is None:
        return
    assert from_wire(type(loss), json.loads(json.dumps(config))) == loss
    assert type(loss).from_config(**config) == loss
    assert get_loss(loss.name, config) == loss


@pytest.mark.parametrize("loss", DEFAULTS, ids=ids(DEFAULTS))
@given(data=st.data())
def test_random_hyperparameters(loss: Loss, data: st.DataObject) -> None:
    """So is one of random numbers: whatever a loss accepts comes back."""
    config = {}
    for key, default in config_keys(type(loss)).items():
        if isinstance(default, float) and data.draw(st.booleans()):
            config[key] = data.draw(st.floats(0, 2, exclude_min=True))
    try:
        made = from_wire(type(loss), config)
    except ConfigError:
        return
    sent = to_wire(made)
    assert sent is not None
    assert from_wire(type(loss), sent) == made


@pytest.mark.parametrize("loss", DEFAULTS, ids=ids(DEFAULTS))
def test_unknown_keys_suggest(loss: Loss) -> None:
    """A slip of the keyboard is answered with the right spelling."""
    for key in config_keys(type(loss)):
        with pytest.raises(ConfigError, match=f"did you mean '{key}'"):
            from_wire(type(loss), {key + "x": 1.0})


@pytest.mark.parametrize(
    "given", [{"kl_estimator": "k2"}, {"kl_gradient": "none"}, {"kl_beta": 0.0, "kl_gradient": "none"}]
)
def test_keys_without_effect(given: dict[str, Any]) -> None:
    """A kind of KL without a KL is refused."""
    with pytest.raises(ConfigError, match="no effect without kl_beta"):
        from_wire(GRPO, given)


def test_what_no_keys_build() -> None:
    """A loss that no keys build says so, instead of travelling as another one."""
    assert to_wire(GRPO(kl=KL(importance=False))) is None
    assert to_wire(dataclasses.replace(GRPO(), clip=None)) is None
