"""Arguments of losses: old spellings still work and say the new one, wrong types and values have errors of ours."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import pullback.losses
from pullback.datums import Datum, ModelInput, validate
from pullback.errors import ConfigError, DatumError, IncompleteUnitError, InvalidDatumsError
from pullback.losses import (
    AGGREGATIONS,
    DPO,
    GRPO,
    KL,
    ORPO,
    PPO,
    Aggregation,
    ClipRange,
    CrossEntropy,
    ImportanceSampling,
    PairTerm,
    Responses,
    SequenceTerm,
    Term,
    TokenBatch,
    TokenTerm,
    clipped_surrogate,
    fixed_length,
    functional,
    get_loss,
    group_advantages,
    preset,
)

ONES = torch.ones(4)


def four_tokens(**inputs: Any) -> TokenBatch:
    """One sequence of four tokens with every input."""
    return TokenBatch.from_packed(
        -ONES, [4], weights=ONES, advantages=ONES, rollout_logprobs=-ONES, ref_logprobs=-ONES, **inputs
    )


def test_clip_range_is_absolute() -> None:
    """Epsilons given as bounds are refused, with the constructor that takes them."""
    with pytest.raises(ConfigError, match="from_epsilon"):
        ClipRange(0.2, 0.28)
    assert ClipRange.from_epsilon(0.2, 0.28) == ClipRange(0.8, 1.28)
    assert ClipRange.from_epsilon(0.2, math.inf) == ClipRange(0.8, math.inf)
    assert ClipRange.from_log(math.log(2), 0.5) == ClipRange(0.5, math.exp(0.5))


def test_bare_number_is_an_epsilon() -> None:
    """PPO(0.2) and GRPO(clip=0.2) hold the range 0.8 to 1.2, and so does the formula itself."""
    assert PPO(0.2) == PPO(ClipRange(0.8, 1.2)) == PPO()
    assert GRPO(clip=0.3).clip == ClipRange(0.7, 1.3)
    assert GRPO(kl=0.04) == GRPO(kl=KL(beta=0.04))
    ratio = torch.tensor([0.5, 1.0, 1.5])
    with pytest.warns(DeprecationWarning, match=r"is now pullback\.losses\.functional\.ppo_clip"):
        assert clipped_surrogate(ratio, torch.ones(3), 0.2).tolist() == pytest.approx([-0.5, -1.0, -1.2])


def test_old_spellings_of_clip_ranges() -> None:
    """RatioBand, from_offsets and the argument band are found, with a warning that names the new spelling."""
    with pytest.warns(DeprecationWarning, match=r"pullback\.losses\.ClipRange"):
        assert pullback.losses.RatioBand is ClipRange
    with pytest.warns(DeprecationWarning, match="from_epsilon"):
        assert ClipRange.from_offsets(0.2, 0.28) == ClipRange.from_epsilon(0.2, 0.28)
    with (
        pytest.warns(DeprecationWarning, match="clipped_surrogate is now"),
        pytest.warns(DeprecationWarning, match="band of clipped_surrogate is now clip"),
    ):
        old = clipped_surrogate(ONES, ONES, band=None)  # type: ignore[call-arg]
    with pytest.warns(DeprecationWarning, match="clipped_surrogate is now"):
        assert torch.equal(old, clipped_surrogate(ONES, ONES, clip=None))


def test_old_formulas() -> None:
    """The formulas whose arguments have changed give what the new ones give, and name them."""
    with pytest.warns(DeprecationWarning, match=r"kl_value is now pullback\.losses\.functional\.kl"):
        assert torch.equal(pullback.losses.kl_value("k2", -ONES), functional.kl(-ONES, 0.0, "k2"))
    with pytest.warns(DeprecationWarning, match=r"dpo_sigmoid is now pullback\.losses\.functional\.dpo"):
        assert torch.equal(pullback.losses.dpo_sigmoid(0.3 * ONES, 0.1), functional.dpo(3 * ONES, 2 * ONES, 0.3, 0.1))
    with pytest.warns(DeprecationWarning, match="clipped_surrogate is now"):
        old = clipped_surrogate(torch.exp(-ONES), -ONES, ClipRange(0.5, 1.5))
    assert torch.equal(old, functional.ppo_clip(-ONES, 0.0, -ONES, 0.5, 1.5))


@given(d=st.lists(st.floats(-3, 3), min_size=3, max_size=3), epsilon=st.floats(0.05, 0.9))
def test_old_formulas_of_any_numbers(d: list[float], epsilon: float) -> None:
    """The same on both sides of the range and of 0; advantages are constants as they are in the new ones."""
    log_ratio = torch.tensor([*d, -2.0, 2.0, -2.0, 2.0], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([0.7, -0.7, 1.3, 1.0, 1.0, -1.0, -1.0], dtype=torch.float64, requires_grad=True)
    with pytest.warns(DeprecationWarning, match="is now"):
        pairs = [
            (
                pullback.losses.clipped_surrogate(log_ratio.exp(), advantages, epsilon),
                functional.ppo_clip(log_ratio, 0.0, advantages, 1 - epsilon, 1 + epsilon),
            ),
            (
                pullback.losses.clipped_surrogate(log_ratio.exp(), advantages, None),
                functional.importance_sampling(log_ratio, 0.0, advantages),
            ),
            (pullback.losses.kl_value("k3", log_ratio), functional.kl(log_ratio, 0.0, "k3")),
            (pullback.losses.dpo_sigmoid(log_ratio, 0.1), functional.dpo(log_ratio, 0 * log_ratio, 1.0, 0.1)),
        ]
    for old, new in pairs:
        torch.testing.assert_close(old, new, rtol=1e-12, atol=1e-14)
        slopes = [torch.autograd.grad(x.sum(), (log_ratio, advantages), allow_unused=True) for x in (old, new)]
        torch.testing.assert_close(slopes[0][0], slopes[1][0], rtol=1e-12, atol=1e-14)
        assert slopes[0][1] is None


@pytest.mark.parametrize("rim", [0.0, 1.0])
def test_the_rims_of_an_open_interval_are_refused(rim: float) -> None:
    """A response whose probability is 1 has infinite odds."""
    with pytest.raises(ConfigError, match="max_prob must be a finite number above 0 and below 1, got"):
        ORPO(max_prob=rim)


def test_old_spellings_of_the_rollout_policy() -> None:
    """The anchor and the log-probs of the behaviour policy are those of the rollout policy."""
    with pytest.warns(DeprecationWarning, match="anchor='rollout'"):
        assert GRPO(anchor="behaviour") == GRPO()  # type: ignore[arg-type]
    with pytest.warns(DeprecationWarning, match="behaviour_logprobs of TokenBatch.from_packed is now rollout_logprobs"):
        packed = TokenBatch.from_packed(-ONES, [4], behaviour_logprobs=-ONES)
    with pytest.warns(DeprecationWarning, match="behaviour_logprobs of TokenBatch.from_padded is now rollout_logprobs"):
        padded = TokenBatch.from_padded(-ONES[None], ONES[None], behaviour_logprobs=-ONES[None])
    for batch in (packed, padded):
        assert batch.rollout_logprobs is not None
        with pytest.warns(DeprecationWarning, match="rollout_logprobs"):
            assert batch.behaviour_logprobs is batch.rollout_logprobs


def test_formulas_are_public_and_pure() -> None:
    """Each formula of losses.functional has its source or equation, and the losses' module has it too."""
    for name in functional.__all__:
        formula = getattr(functional, name)
        if callable(formula) and hasattr(formula, "__code__"):
            assert "``" in (formula.__doc__ or ""), name
            assert getattr(pullback.losses, name, formula) is formula
    for path in Path(functional.__file__).parent.glob("*.py"):
        assert "TokenBatch" not in path.read_text(), path


WRONG: dict[str, Callable[[], object]] = {
    "kl_beta as text": lambda: get_loss("grpo", {"kl_beta": "0.1"}),
    "KL in the place of clip": lambda: GRPO(KL()),  # type: ignore[arg-type]
    "clip as text": lambda: PPO("0.2"),  # type: ignore[arg-type]
    "clip as flag": lambda: PPO(True),
    "epsilon above 1": lambda: PPO(1.2),
    "epsilon NaN": lambda: PPO(math.nan),
    "kl as text": lambda: GRPO(kl="0.04"),  # type: ignore[arg-type]
    "anchor misspelt": lambda: GRPO(anchor="rolout"),  # type: ignore[arg-type]
    "no aggregation": lambda: CrossEntropy(None),  # type: ignore[arg-type]
    "option of a preset misspelt": lambda: preset("trl:dapo", epsilon_hi=0.3),
    "option of a preset that has none": lambda: preset("seed:cross_entropy", beta=0.3),
    "length as text": lambda: fixed_length("512"),  # type: ignore[arg-type]
    "length infinite": lambda: fixed_length(math.inf),
    "counts as number": lambda: CrossEntropy("token_mean").evaluate(four_tokens(), 4),  # type: ignore[arg-type]
    "counts as number of a sum": lambda: CrossEntropy().evaluate(four_tokens(), 4),  # type: ignore[arg-type]
    "denominator misspelt": lambda: Aggregation("mine", "one", "token"),  # type: ignore[arg-type]
    "coefficient misspelt": lambda: Aggregation("mine", "sequences", "tokens"),  # type: ignore[arg-type]
    "length of nothing": lambda: Aggregation("mine", "fixed", "sequences", 0.0),
    "unit misspelt": lambda: Term("nll", ONES, "tokens", AGGREGATIONS["sum"]),  # type: ignore[arg-type]
    "term without aggregation": lambda: Term("nll", ONES, "token", "sums"),  # type: ignore[arg-type]
    "name of an aggregation as number": lambda: Aggregation(3, "one", "tokens"),  # type: ignore[arg-type]
    "name of a term as number": lambda: Term(3, ONES, "token", AGGREGATIONS["sum"]),  # type: ignore[arg-type]
    "values as list": lambda: Term("nll", [1.0], "token", AGGREGATIONS["sum"]),  # type: ignore[arg-type]
    "no definition": lambda: TokenTerm("nll", None),  # type: ignore[arg-type]
    "values for a definition": lambda: TokenTerm("nll", ONES),  # type: ignore[arg-type]
    "no definition of sequences": lambda: SequenceTerm("kto", None, None, (), "sequence_mean"),  # type: ignore[arg-type]
    "no definition of pairs": lambda: PairTerm("dpo", None, Responses(), (), "pair_mean"),  # type: ignore[arg-type]
    "field for responses": lambda: PairTerm("dpo", functional.dpo, "ref_logprobs", (), "pair_mean"),  # type: ignore[arg-type]
    "scale as text": lambda: Term("nll", ONES, "token", AGGREGATIONS["sum"], "2"),  # type: ignore[arg-type]
    "tokens of a term by pairs": lambda: Term("nll", ONES, "token", AGGREGATIONS["pair_mean"]),
    "negative eps": lambda: group_advantages(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]), eps=-1.0),
    **{
        f"{loss.name} by pairs": lambda loss=loss: loss(aggregation="pair_mean")  # type: ignore[misc]
        for loss in (CrossEntropy, ImportanceSampling, PPO, GRPO)
    },
    **{
        f"{loss.name} by tokens of pairs": lambda loss=loss: loss(  # type: ignore[misc]
            aggregation=Aggregation("pair_mean", "one", "tokens")
        )
        for loss in (DPO, ORPO)
    },
}


@pytest.mark.parametrize("act", WRONG.values(), ids=WRONG)
def test_wrong_hyperparameters(act: Callable[[], object]) -> None:
    """A hyperparameter of the wrong type or value is a ConfigError, where it is given."""
    with pytest.raises(ConfigError):
        act()


@pytest.mark.parametrize("value", [True, "0.04", [0.04]])
def test_a_penalty_is_none_of_these(value: Any) -> None:
    """The message says what a loss takes as its penalty."""
    with pytest.raises(ConfigError, match="kl must be a KL, its beta or None"):
        GRPO(kl=value)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: TokenBatch.from_padded(-ONES[None], ONES[None], advantages=[1.0]), "advantages.*list"),  # type: ignore[arg-type]
        (lambda: TokenBatch.from_packed(-ONES, [4], weights=[1.0] * 4), "weights.*list"),  # type: ignore[arg-type]
        (lambda: TokenBatch.from_packed([-1.0], [1]), "logprobs.*list"),  # type: ignore[arg-type]
        (lambda: TokenBatch.from_padded([[-1.0]], ONES[None]), "logprobs.*list"),  # type: ignore[arg-type]
        (lambda: PPO().evaluate({"logprobs": 1}), "TokenBatch, got dict"),  # type: ignore[arg-type]
    ],
)
def test_wrong_tensors(act: Callable[[], object], message: str) -> None:
    """What should be tensors and is not has an error that names it."""
    with pytest.raises(DatumError, match=message):
        act()


def slopes(act: Callable[[Tensor], Tensor]) -> list[float]:
    """The gradient of a loss of four log-probs, two sequences of two."""
    leaf = torch.full((4,), -3.0, requires_grad=True)
    (gradient,) = torch.autograd.grad(act(leaf), leaf)
    return [float(x) for x in gradient]


@pytest.mark.parametrize("loss", [DPO(), ORPO()], ids=["dpo", "orpo"])
def test_roles_of_neighbours(loss: DPO | ORPO) -> None:
    """Neighbours given as rejected, chosen by their roles: the chosen one rises, at every entrance."""
    inputs = {"ref_logprobs": torch.full((4,), -3.0), "weights": ONES}
    roles = torch.tensor([0, 1])
    numbers = {"target_tokens": [2, 3], "weights": [1.0, 1.0], "ref_logprobs": [-3.0, -3.0]}
    data = [Datum(ModelInput.from_ints([1, 2]), {**numbers, "role": [role]}) for role in (0, 1)]
    packed = slopes(lambda lp: loss.evaluate(TokenBatch.from_packed(lp, [2, 2], role=roles, **inputs)).loss)
    listed = slopes(lambda lp: loss(data, lp.split(2))[0])
    swapped = slopes(lambda lp: loss.evaluate(TokenBatch.from_packed(lp, [2, 2], role=1 - roles, **inputs)).loss)
    plain = slopes(lambda lp: loss.evaluate(TokenBatch.from_packed(lp, [2, 2], **inputs)).loss)
    assert packed[2] < 0
    assert packed[2] < packed[0]
    assert listed == packed == [plain[2], plain[3], plain[0], plain[1]]
    assert swapped == plain
    validate(data, pairs=True)


def test_neighbours_of_one_role_are_refused() -> None:
    """Two chosen neighbours are no pair, with datums and with tensors."""
    batch = TokenBatch.from_packed(-ONES, [2, 2], ref_logprobs=-ONES, weights=ONES, role=torch.tensor([1, 1]))
    with pytest.raises(IncompleteUnitError, match="exactly one chosen"):
        DPO().evaluate(batch)
    data = [Datum(ModelInput.from_ints([1, 2]), {"role": [1]})] * 2
    with pytest.raises(InvalidDatumsError, match=r"pair 0 .* 2 chosen"):
        validate(data, pairs=True)


def test_labels_are_no_weights() -> None:
    """Labels of a transformers trainer are refused in the place of a mask, which they would pass for."""
    logprobs, labels = torch.full((2, 4), -1.0), torch.tensor([[-100, -100, 5, 9], [-100, 3, 2, 1]])
    with pytest.raises(ConfigError, match="weights = labels != -100"):
        TokenBatch.from_padded(logprobs, labels)
    whole = torch.tensor([[7, 8, 5, 9], [4, 3, 2, 1]])
    with pytest.raises(ConfigError, match="weights are int64 with values from 1 to 9: are these labels"):
        TokenBatch.from_padded(logprobs, whole)
    with pytest.raises(ConfigError, match="weights are int32 with values from -1 to 1"):
        TokenBatch.from_packed(logprobs.flatten(), [4, 4], weights=torch.tensor([-1, 0, 1, 1] * 2, dtype=torch.int32))
    for weights in (whole > 4, (whole > 4).long(), whole.float()):
        assert TokenBatch.from_padded(logprobs, weights).trained.sum() == (weights != 0).sum()
    assert TokenBatch.from_padded(logprobs, labels != -100).trained.sum() == 5
