"""What a newcomer gives by mistake: each has an error that says what was got, what is expected, and what to do."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pullback.errors import ConfigError, DatumError, LengthError, MissingFieldError
from pullback.losses import DPO, GRPO, KL, PPO, CrossEntropy, Loss, TokenBatch, get_loss, group_advantages, loss_names
from pullback.losses.base import GradientKind
from pullback.losses.evaluation.terms import Summand

LOGPROBS = torch.full((2, 3), -1.0)
ONES = torch.ones(2, 3)


class Foreign(NamedTuple):
    """A datum of somebody else, of plain lists."""

    loss_fn_inputs: dict[str, Any]


@pytest.mark.parametrize(
    ("loss", "inputs", "words"),
    [
        (
            GRPO(),
            {"advantages": ONES},
            "missing input 'rollout_logprobs' (in a datum: 'logprobs'): grpo needs it in its TokenBatch (log-probs of the "
            "rollout policy (the sampler), at its temperature); the TokenBatch has: weights, advantages; on policy give "
            "logprobs.detach()",
        ),
        (PPO(), {"rollout_logprobs": LOGPROBS}, "missing input 'advantages': ppo needs it"),
        (DPO(), {}, "missing input 'ref_logprobs': dpo needs it or 'ref_logprob_sums' in its TokenBatch"),
        (DPO(), {}, "the TokenBatch has: weights"),
    ],
)
def test_missing_inputs(loss: Loss, inputs: dict[str, Any], words: str) -> None:
    """By the name that a batch has for it and that of a datum, with what is there."""
    with pytest.raises(MissingFieldError, match=re.escape(words)):
        loss.evaluate(TokenBatch.from_padded(LOGPROBS, ONES, **inputs))


def test_an_input_that_only_the_maths_misses() -> None:
    with pytest.raises(MissingFieldError, match=r"'rollout_logprobs' \(in a datum: 'logprobs'\).* has: log-probs only"):
        TokenBatch.from_packed(LOGPROBS.flatten(), [6]).given("rollout_logprobs")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("advantage", "advantages"),
        ("old_log_probs", "old_logprobs"),
        ("ref_logprob", "ref_logprobs"),
        ("rollout_logps", "rollout_logprobs"),
    ],
)
def test_misspelt_inputs(name: str, meant: str) -> None:
    inputs: dict[str, Any] = {name: ONES}
    with pytest.raises(TypeError, match=f"no input '{name}' .did you mean '{meant}'"):
        TokenBatch.from_padded(LOGPROBS, ONES, **inputs)
    with pytest.raises(TypeError, match=f"no input '{name}' .did you mean '{meant}'"):
        TokenBatch.from_packed(LOGPROBS.flatten(), [3, 3], **inputs)


def test_logits_are_no_logprobs() -> None:
    """Padded or packed, where the weights are those of tokens; weights of every candidate are taken."""
    logits = torch.full((2, 3, 5), -1.0)
    with pytest.raises(LengthError, match=r"logprobs has 3 dimensions, \[B, T, K\].*pullback.ops.logprobs_from_logits"):
        TokenBatch.from_padded(logits, ONES)
    with pytest.raises(LengthError, match=r"logprobs has 2 dimensions, \[N, K\].*pullback.ops.logprobs_from_logits"):
        TokenBatch.from_packed(logits.flatten(0, 1), [3, 3], weights=ONES.flatten())
    assert TokenBatch.from_padded(logits, torch.ones(2, 3, 5)).trained.all()
    with pytest.raises(LengthError, match=r"expected \(2, 3\) \(the shape of logprobs\)$"):
        TokenBatch.from_padded(LOGPROBS, torch.ones(2))
    with pytest.raises(
        LengthError, match=r"got shape \(2, 3, 5\); logits go through pullback.ops.logprobs_from_logits"
    ):
        TokenBatch.from_labels(logits, torch.ones(2, 4, dtype=torch.int64))
    with pytest.raises(LengthError, match=r"got shape \(6,\)$"):
        TokenBatch.from_labels(LOGPROBS.flatten(), torch.ones(2, 4, dtype=torch.int64))


def test_advantages_of_another_number_of_sequences() -> None:
    """Of a padded batch both shapes that are taken are named; of a packed one there is one."""
    with pytest.raises(
        LengthError, match=r"\(3,\), expected \(2, 3\) \(the shape of logprobs; one per sequence is \[2\]"
    ):
        TokenBatch.from_padded(LOGPROBS, ONES, advantages=torch.ones(3))
    with pytest.raises(LengthError, match=r"expected \(6,\) \(the shape of logprobs\)$"):
        TokenBatch.from_packed(LOGPROBS.flatten(), [3, 3], advantages=torch.ones(2))
    assert TokenBatch.from_padded(LOGPROBS, ONES, advantages=torch.ones(2)).advantages is not None


def test_tensors_in_the_place_of_a_batch() -> None:
    """What makes a batch of them is named."""
    given: Any = LOGPROBS
    with pytest.raises(DatumError, match=r"got Tensor: TokenBatch.from_padded\(logprobs, mask, ...\), from_labels or"):
        GRPO().evaluate(given)


@pytest.mark.parametrize(
    ("rewards", "ids", "name"), [([1.0], torch.zeros(1), "rewards"), (torch.ones(1), 1, "group_id")]
)
def test_rewards_are_tensors(rewards: Any, ids: Any, name: str) -> None:
    with pytest.raises(DatumError, match=f"{name} must be a tensor, one number per sequence, got"):
        group_advantages(rewards, ids)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=5))
def test_cumulative_lengths(lengths: list[int]) -> None:
    """They are refused with what makes lengths of them, wherever they do not pass for lengths; others without."""
    cumulative = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    tokens = torch.full((sum(lengths),), -1.0)
    assert TokenBatch.from_packed(tokens, torch.tensor(cumulative).diff()).num_sequences == len(lengths)
    if sum(cumulative) != sum(lengths):
        for each in (cumulative, torch.tensor(cumulative)):
            with pytest.raises(LengthError, match=r"got .* \(cumulative lengths\? give cu_seqlens.diff\(\)\)"):
                TokenBatch.from_packed(tokens, each)
    with pytest.raises(LengthError, match=r"\]$"):
        TokenBatch.from_packed(tokens, [*lengths, sum(lengths) + 1])


def test_tensors_in_the_place_of_datums() -> None:
    """A loss and its share of a step alike say where tensors go."""
    loss = CrossEntropy("token_mean")
    calls: list[Any] = [loss, loss.with_counts(tokens=6.0)]
    for call in calls:
        with pytest.raises(DatumError, match=r"takes \(data, logprobs_list\).*TokenBatch.from_padded"):
            call(LOGPROBS, ONES)


@pytest.mark.parametrize("weights", [[0, 2, 1], [0.0, 2.0, 1.0]])
def test_whole_numbers_of_datums_are_weights(weights: list[Any]) -> None:
    """Lists of a datum are named, so whole numbers are the numbers; a trainer's labels are refused there too."""
    loss = CrossEntropy()
    assert loss([Foreign({"weights": weights})], [LOGPROBS[0]])[0].item() == 3.0
    with pytest.raises(ConfigError, match="weights contain -100"):
        loss([Foreign({"weights": [-100, 2, 1]})], [LOGPROBS[0]])


@pytest.mark.parametrize("name", [name for name in loss_names() if get_loss(name).unit == "token"])
def test_aggregations_that_do_not_exist(name: str) -> None:
    """What is listed and what is suggested is what the loss takes."""
    for word in ("mean", "pair_mea", "tokenmean"):
        with pytest.raises(ConfigError) as caught:
            get_loss(name, {"aggregation": word})
        listed = re.search("must be one of (.*), got", str(caught.value))
        assert listed is not None
        for each in listed[1].split(", "):
            assert get_loss(name, {"aggregation": each}).main_aggregation.name == each
        meant = re.search("did you mean '(.*)'", str(caught.value))
        assert meant is None or meant[1] in listed[1].split(", ")
    assert meant is not None
    assert meant[1] == "token_mean"


def test_a_kl_needs_its_reference() -> None:
    inputs = {"advantages": ONES, "rollout_logprobs": LOGPROBS}
    with pytest.raises(MissingFieldError, match=r"has: weights, advantages, rollout_logprobs$"):
        GRPO(kl=KL()).evaluate(TokenBatch.from_padded(LOGPROBS, ONES, **inputs))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("kl_beta", "write kl=KL(beta=...); config keys go to get_loss('grpo', {'kl_beta': ...}); it has: clip, kl,"),
        ("beta", "GRPO has no hyperparameter 'beta'; write kl=KL(beta=...); it has: clip, kl, anchor,"),
        ("clip_epsilon", "GRPO has no hyperparameter 'clip_epsilon' (did you mean 'clip'?); it has: clip, kl,"),
        ("clip_low_threshold", "write clip=ClipRange(low=..., high=...); config keys go to get_loss('grpo', "),
        ("agregation", "(did you mean 'aggregation'?)"),
        ("epsilon", "no hyperparameter 'epsilon'; write clip=ClipRange.from_epsilon(low, high); it has: clip,"),
        ("epsilon_high", "write clip=ClipRange.from_epsilon(low, high); it has: clip,"),
        (
            "nonsense",
            "GRPO has no hyperparameter 'nonsense'; it has: clip, kl, anchor, aggregation, dual_clip, correction",
        ),
    ],
)
def test_hyperparameters_that_do_not_exist(name: str, words: str) -> None:
    """A config key goes to another place, and a part of the loss has what is a key there."""
    wrong: dict[str, Any] = {name: 0.1}
    with pytest.raises(TypeError, match=re.escape(words)):
        GRPO(**wrong)


@pytest.mark.parametrize("name", loss_names())
def test_no_loss_takes_what_it_does_not_have(name: str) -> None:
    """Neither by keyword nor by place; a loss is copied and pickled as before."""
    kind: Any = type(get_loss(name))
    with pytest.raises(TypeError, match="has no hyperparameter 'nonsense'"):
        kind(nonsense=1)
    with pytest.raises(TypeError, match="positional"):
        kind(*[None] * 20)
    loss = get_loss(name)
    assert pickle.loads(pickle.dumps(loss)) == copy.deepcopy(loss) == dataclasses.replace(loss) == loss  # type: ignore[type-var]


class Bare(Loss):
    """A loss of another package without fields."""

    name: ClassVar[str] = "bare"
    aggregation = "sum"
    gradient_kind: ClassVar[GradientKind] = "constant"
    required_inputs: ClassVar[tuple[str, ...]] = ()

    def terms(self, batch: TokenBatch) -> tuple[Summand, ...]:
        return CrossEntropy().terms(batch)


class Initialized(Bare):
    """One that takes its hyperparameters as it likes."""

    def __init__(self, scale: float) -> None:
        self.scale = scale


def test_losses_that_are_no_dataclasses() -> None:
    arguments: dict[str, Any] = {"scale": 2.0}
    assert Bare().evaluate(TokenBatch.from_padded(LOGPROBS, ONES)).loss.item() == 6.0
    assert Initialized(**arguments).scale == 2.0
    with pytest.raises(TypeError, match="Bare takes no arguments"):
        Bare(**arguments)
