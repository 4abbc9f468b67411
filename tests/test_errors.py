"""Bad input: each kind has an error of ours that says what, where and what to do; afterwards the backend still trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from helpers import distance, make_data, tiny_backend, weights_of
from torch import Tensor

from pullback.backends import AdamParams, SamplingParams, TorchBackend
from pullback.datums import Datum, ModelInput
from pullback.errors import (
    BackendError,
    BiasedGradientError,
    CheckpointError,
    ConfigError,
    DatumError,
    DoubleNormalizationError,
    EmptyUnitError,
    InvalidDatumsError,
    LossTypeError,
    MissingReferenceError,
    MixedDenominatorsError,
    NonFiniteError,
    NotDifferentiableError,
    PrecedingOperationFailed,
    PullbackError,
    UnknownLossError,
)
from pullback.losses import DPO, GRPO, KL, ORPO, PPO, ClipRange, CrossEntropy, fixed_length, preset, recipe

DATA = make_data([4, 3, 5, 2])
NAN, INF = math.nan, math.inf
Action = Callable[[TorchBackend], object]


class Bad(NamedTuple):
    """What is done, the error it must give, and words that must be in its message."""

    name: str
    action: Action
    error: type[PullbackError]
    words: Sequence[str]


def changed(**inputs: Any) -> list[Datum]:
    """The data with other inputs in datum 1 (three tokens, the first one untrained)."""
    return [DATA[0], DATA[1].with_inputs(**inputs), *DATA[2:]]


def without(key: str) -> list[Datum]:
    """The data without one key in datum 1."""
    kept = {k: v for k, v in DATA[1].loss_fn_inputs.items() if k != key}
    return [DATA[0], Datum(DATA[1].model_input, kept), *DATA[2:]]


def tokens(*ids: int) -> list[Datum]:
    """The data with other input tokens in datum 1."""
    return [DATA[0], Datum(ModelInput.from_ints(ids), DATA[1].loss_fn_inputs), *DATA[2:]]


def named(data: Any, loss: Any = "grpo", config: Any = None, **more: Any) -> Action:
    return lambda backend: backend.forward_backward(data, loss, config, **more).result()


def custom(function: Any, data: Any = DATA) -> Action:
    return lambda backend: backend.forward_backward_custom(data, function).result()


def total(logprobs: list[Tensor]) -> Tensor:
    return torch.stack([lp.sum() for lp in logprobs]).sum()


def step(*arguments: Any, first: Any = "ppo") -> Action:
    def action(backend: TorchBackend) -> None:
        backend.forward_backward(DATA, first).result()
        try:
            backend.optim_step(*arguments).result()
        finally:
            backend.discard_gradients()

    return action


def after_failure(backend: TorchBackend) -> None:
    failed = backend.forward_backward(DATA[:3], "dpo")
    try:
        backend.optim_step(AdamParams()).result()
    finally:
        failed.exception()


def mixed(backend: TorchBackend) -> None:
    backend.discard_gradients()
    backend.forward_backward(DATA, "dpo").result()
    try:
        backend.forward_backward(DATA, "grpo").result()
    finally:
        backend.discard_gradients()


def sample(prompts: Any, n: int, **params: Any) -> Action:
    return lambda backend: backend.sample(prompts, n, SamplingParams(**params)).result()


def make(builder: Callable[[], object]) -> Action:
    return lambda backend: builder()


ONE = [ModelInput.from_ints([1])]
NO_PAIR = [d.with_inputs(pair_id=[i // 2]) for i, d in enumerate(DATA)]
TWO_CHOSEN = [d.with_inputs(pair_id=[i // 2], role=[1]) for i, d in enumerate(DATA)]

DATUM_ROWS = [
    Bad("empty data", named([]), InvalidDatumsError, ["data is empty"]),
    Bad("one datum, no list", named(DATA[0]), InvalidDatumsError, ["got one Datum", "[datum]"]),
    Bad("a string", named("data"), InvalidDatumsError, ["list of Datum", "str"]),
    Bad("a row", named([{"input_ids": [1]}]), InvalidDatumsError, ["datum 0", "builtins.dict", "from_rows(rows, tokenizer)"]),
    Bad("foreign object", named([DATA[0], object()]), InvalidDatumsError, ["datum 1", "object"]),
    Bad("input token too large", named(tokens(1, 99, 2)), InvalidDatumsError, ["datum 1", "position 1: 99", "0 to 16"]),
    Bad("negative token", named(tokens(1, -5, 2)), InvalidDatumsError, ["datum 1", "position 1: -5"]),
    Bad("target out of vocabulary", named(changed(target_tokens=[1, 2, 17])), InvalidDatumsError, ["datum 1", "17"]),
    Bad("no tokens", named(tokens()), InvalidDatumsError, ["datum 1", "empty"]),
    Bad("short targets", named(changed(target_tokens=[1, 2])), InvalidDatumsError, ["datum 1", "3 tokens", "same length"]),
    Bad("long weights", named(changed(weights=[1.0] * 4)), InvalidDatumsError, ["datum 1", "'weights'", "[4]", "[3]"]),
    Bad("short advantages", named(changed(advantages=[1.0])), InvalidDatumsError, ["datum 1", "'advantages'", "[1]"]),
    Bad("short log-probs", named(changed(logprobs=[-1.0])), InvalidDatumsError, ["datum 1", "'logprobs'"]),
    Bad("two group ids", named(changed(group_id=[1, 2])), InvalidDatumsError, ["datum 1", "'group_id'", "[1]"]),
    Bad("NaN weight", named(changed(weights=[0.0, NAN, 1.0])), InvalidDatumsError, ["datum 1", "position 1", "use 0"]),
    Bad("infinite weight", named(changed(weights=[0.0, 1.0, INF])), InvalidDatumsError, ["datum 1", "position 2"]),
    Bad("a label as a weight", named(changed(weights=[-100.0, 1.0, 1.0])), InvalidDatumsError, ["datum 1: 'weights' is -100 at position 0", "give weight 0 there"]),
    Bad("custom, a label as a weight", custom(lambda d, lp: (total(lp), {}), changed(weights=[-100.0, 1.0, 1.0])), InvalidDatumsError, ["-100"]),
    Bad("NaN advantage", named(changed(advantages=[0.0, NAN, 1.0])), InvalidDatumsError, ["'advantages'", "trained position 1"]),
    Bad("NaN log-prob", named(changed(logprobs=[0.0, -1.0, NAN])), InvalidDatumsError, ["'logprobs'", "position 2"]),
    Bad("probabilities", named(changed(logprobs=[0.5, 0.5, 0.5])), InvalidDatumsError, ["datum 1", "probabilities"]),
    Bad("no targets", named(without("target_tokens"), "ppo"), InvalidDatumsError, ["datum 1", "missing required field 'target_tokens'"]),
    Bad("no weights", named(without("weights")), InvalidDatumsError, ["datum 1", "missing required field 'weights'"]),
    Bad("no advantages", named(without("advantages")), InvalidDatumsError, ["missing required field 'advantages'"]),
    Bad("no sampler log-probs", named(without("logprobs")), InvalidDatumsError, ["missing required field 'logprobs'"]),
    Bad("no reference", named(without("ref_logprobs"), "dpo"), InvalidDatumsError, ["missing required field 'ref_logprobs'"]),
    Bad("KL without reference", named(without("ref_logprobs"), "grpo", {"kl_beta": 0.1}), InvalidDatumsError, ["'ref_logprobs'"]),
    Bad("misspelt key", named(changed(advantage=[1.0] * 3)), InvalidDatumsError, ["'advantage'", "did you mean 'advantages'"]),
    Bad("another library's key", named(changed(rollout_logprobs=[-1.0] * 3)), InvalidDatumsError, ["did you mean 'logprobs'?"]),
    Bad("key in some datums", named(changed(old_logprobs=[-1.0] * 3)), InvalidDatumsError, ["'old_logprobs'", "all or none"]),
    Bad("half a pair", named(DATA[:3], "dpo"), InvalidDatumsError, ["datum 2", "partner"]),
    Bad("pair without role", named(NO_PAIR, "dpo"), InvalidDatumsError, ["role", "chosen"]),
    Bad("two chosen", named(TWO_CHOSEN, "dpo"), InvalidDatumsError, ["pair 0", "exactly one"]),
    Bad("half of a named pair", named(TWO_CHOSEN[:1], "orpo"), InvalidDatumsError, ["pair 0", "0 rejected"]),
    Bad("bad role", named(changed(role=[5], pair_id=[0]), "dpo"), InvalidDatumsError, ["datum 1", "'role'"]),
    Bad("empty response, ORPO", named(changed(weights=[0.0] * 3), "orpo"), EmptyUnitError, ["no trained token"]),
    Bad("empty response, DPO", named(changed(weights=[0.0] * 3), "dpo"), EmptyUnitError, ["no trained token"]),
    Bad("float tokens", make(lambda: ModelInput.from_ints([1.5])), DatumError, ["integers"]),  # type: ignore[list-item]
    Bad("float targets", make(lambda: changed(target_tokens=[1.5, 2, 3])), DatumError, ["'target_tokens'", "integers"]),
    Bad("words for numbers", make(lambda: changed(weights=["a", "b", "c"])), DatumError, ["'weights'", "numbers"]),
    Bad("tokens for a ModelInput", make(lambda: Datum([1, 2], {})), DatumError, ["from_ints"]),  # type: ignore[arg-type]
    Bad("custom, short weights", custom(lambda d, lp: (total(lp), {}), changed(weights=[1.0])), InvalidDatumsError, ["datum 1", "'weights'"]),
    Bad("nothing to score", custom(lambda d, lp: (total(lp), {}), [Datum(ModelInput.from_ints([1]), {})]), InvalidDatumsError, ["nothing to score"]),
]  # fmt: skip

LOSS_ROWS = [
    Bad("unknown loss", named(DATA, "gpro"), UnknownLossError, ["gpro", "did you mean 'grpo'", "cross_entropy"]),
    Bad("a recipe for a loss", named(DATA, "sft"), UnknownLossError, ["'sft' is a recipe: loss, normalization = recipe('sft')"]),
    Bad("unknown key", named(DATA, "grpo", {"kl_bta": 1}), ConfigError, ["kl_bta", "did you mean 'kl_beta'"]),
    Bad("tensor in config", named(DATA, "grpo", {"kl_beta": torch.ones(2)}), ConfigError, ["kl_beta", "datums"]),
    Bad("config no mapping", named(DATA, "grpo", [1]), ConfigError, ["mapping", "list"]),
    Bad("config with object", named(DATA, DPO(), {"beta": 1}), ConfigError, ["dpo", "object"]),
    Bad("negative beta", named(DATA, "dpo", {"beta": -1}), ConfigError, ["beta", "-1"]),
    Bad("text for a number", named(DATA, "dpo", {"beta": "x"}), ConfigError, ["beta", "'x'"]),
    Bad("negative KL", make(lambda: KL(beta=-1)), ConfigError, ["beta", "-1"]),
    Bad("unknown estimator", make(lambda: KL("k4")), ConfigError, ["k4", "k3"]),  # type: ignore[arg-type]
    Bad("biased KL", named(DATA, "grpo", {"kl_beta": 0.1, "kl_estimator": "k1", "kl_gradient": "pathwise"}), BiasedGradientError, ["acknowledge_biased"]),
    Bad("KL without its weight", named(DATA, "grpo", {"kl_estimator": "k2"}), ConfigError, ["kl_estimator='k2'", "kl_beta"]),
    Bad("epsilons as bounds", make(lambda: ClipRange(0.2, 0.2)), ConfigError, ["from_epsilon"]),
    Bad("inverted clip range", named(DATA, "ppo", {"clip_low_threshold": 1.5}), ConfigError, ["clip range low"]),
    Bad("aggregation misspelt", named(DATA, "grpo", {"aggregation": "token_men"}), ConfigError, ["did you mean 'token_mean'"]),
    Bad("DPO by tokens", make(lambda: DPO(aggregation="token_mean")), ConfigError, ["pair_mean"]),
    Bad("smoothing too large", make(lambda: DPO(label_smoothing=0.7)), ConfigError, ["label_smoothing"]),
    Bad("max_prob of 1", make(lambda: ORPO(max_prob=1.0)), ConfigError, ["max_prob"]),
    Bad("clip without ratio", make(lambda: GRPO(anchor="none")), ConfigError, ["clip=None"]),
    Bad("length of zero", make(lambda: fixed_length(0)), ConfigError, ["positive"]),
    Bad("unknown recipe", make(lambda: recipe("stf")), ConfigError, ["did you mean 'sft'"]),
    Bad("unknown preset", make(lambda: preset("trl:dop")), ConfigError, ["trl:dpo"]),
    Bad("function by name's door", named(DATA, lambda d, lp: (total(lp), {})), LossTypeError, ["forward_backward_custom"]),
    Bad("a class of losses", named(DATA, GRPO), LossTypeError, ["the class GRPO", "give an object of it, GRPO(...)"]),
    Bad("counts without key", named(DATA, "grpo", counts={"pairs": 3}), ConfigError, ["grpo is divided by tokens, but the totals given are of pairs"]),
    Bad("counts of zero", named(DATA, "grpo", counts={"tokens": 0}), ConfigError, ["above 0"]),
    Bad("two denominators", mixed, MixedDenominatorsError, ["dpo", "tokens", "pairs", "counts"]),
    Bad("weights that cancel", named(changed(weights=[0.0, 1.0, -1.0]), ORPO()), EmptyUnitError, ["positive sum"]),
    Bad("no function", custom(3), LossTypeError, ["function"]),
    Bad("a vector", custom(lambda d, lp: (lp[0], {})), LossTypeError, ["shape (4,)", "scalar"]),
    Bad("a float", custom(lambda d, lp: (1.0, {})), LossTypeError, ["float", ".item()"]),
    Bad("no metrics", custom(lambda d, lp: total(lp)), LossTypeError, ["(loss, metrics)", "Tensor"]),
    Bad("None", custom(lambda d, lp: None), LossTypeError, ["NoneType"]),
    Bad("three values", custom(lambda d, lp: (total(lp), {}, 1)), LossTypeError, ["tuple of 3"]),
    Bad("metrics a list", custom(lambda d, lp: (total(lp), [])), LossTypeError, ["list", "dict"]),
    Bad("detached", custom(lambda d, lp: (total([x.detach() for x in lp]), {})), NotDifferentiableError, ["log-prob", ".detach()"]),
    Bad("through item", custom(lambda d, lp: (torch.tensor(total(lp).item()), {})), NotDifferentiableError, [".item()"]),
    Bad("another leaf", custom(lambda d, lp: (torch.ones((), requires_grad=True) * 2, {})), NotDifferentiableError, ["log-prob"]),
    Bad("NaN loss", custom(lambda d, lp: (total(lp) * NAN, {"a": 1})), NonFiniteError, ["nan"]),
    Bad("NaN through a mask", custom(lambda d, lp: ((lp[1] - lp[1]).sqrt().sum(), {})), NonFiniteError, ["datum 1", "token 0", "torch.where"]),
]  # fmt: skip

STEP_ROWS = [
    Bad("mean, then divided", step(AdamParams(), "num_loss_tokens", first=CrossEntropy("token_mean")), DoubleNormalizationError, ["already a mean", "unset"]),
    Bad("a dict of hyperparameters", step({"lr": 1e-3}), ConfigError, ["AdamParams(learning_rate=...)", "got dict"]),
    Bad("unknown mode", step(AdamParams(), "tokens"), ConfigError, ["'tokens'", "num_loss_tokens"]),
    Bad("no AdamParams", step({"lr": 1}), ConfigError, ["AdamParams", "dict"]),
    Bad("negative rate", make(lambda: AdamParams(learning_rate=-1)), ConfigError, ["learning_rate"]),
    Bad("beta of 1", make(lambda: AdamParams(beta2=1.0)), ConfigError, ["beta2"]),
    Bad("NaN eps", make(lambda: AdamParams(eps=NAN)), ConfigError, ["eps"]),
    Bad("after a failure", after_failure, PrecedingOperationFailed, ["partner", "discard_gradients"]),
    Bad("no reference model", lambda b: b.reference(), MissingReferenceError, ["reference=", "LoRA"]),
    Bad("name with a folder", lambda b: b.save_state("a/b").result(), CheckpointError, ["'a/b'"]),
    Bad("no such checkpoint", lambda b: b.load_state("/nowhere/at/all").result(), BackendError, []),
    Bad("empty prompt", sample([ModelInput.empty()], 1), InvalidDatumsError, ["prompt 0", "empty"]),
    Bad("prompt out of vocabulary", sample([ModelInput.from_ints([77])], 1), InvalidDatumsError, ["prompt 0", "17"]),
    Bad("no prompts", sample([], 1), DatumError, ["prompts is empty"]),
    Bad("no completions", sample(ONE, 0), DatumError, ["at least 1"]),
    Bad("no new tokens", sample(ONE, 1, max_tokens=0), ConfigError, ["max_tokens"]),
    Bad("negative temperature", sample(ONE, 1, temperature=-1.0), ConfigError, ["temperature"]),
    Bad("nothing to keep", sample(ONE, 1, top_p=0.0), ConfigError, ["top_p"]),
    Bad("top_k of 0", sample(ONE, 1, top_k=0), ConfigError, ["top_k"]),
    Bad("small budget", make(lambda: tiny_backend(token_budget=0)), ConfigError, ["token_budget"]),
    Bad("unknown layout", make(lambda: tiny_backend(layout="diagonal")), ConfigError, ["diagonal"]),
    Bad("no adapter", make(lambda: TorchBackend(torch.nn.Linear(2, 2))), BackendError, ["hidden_states", "HFModel"]),
]  # fmt: skip

ROWS = [*DATUM_ROWS, *LOSS_ROWS, *STEP_ROWS]


def after_a_good_step(backend: TorchBackend) -> dict[str, Tensor]:
    backend.forward_backward(DATA, PPO()).result()
    assert backend.optim_step(AdamParams(learning_rate=1e-2)).result().stepped
    backend.close()
    return weights_of(backend)


@pytest.fixture(scope="module")
def clean() -> dict[str, Tensor]:
    """The weights of a backend that never saw bad input."""
    return after_a_good_step(tiny_backend())


@pytest.mark.parametrize("bad", ROWS, ids=lambda bad: bad.name)
def test_bad_input(bad: Bad, clean: dict[str, Tensor]) -> None:
    """The error is ours and telling; the next good step is that of a backend that never saw the bad input."""
    backend = tiny_backend()
    with pytest.raises(bad.error) as caught:
        bad.action(backend)
    for word in bad.words:
        assert word in str(caught.value)
    assert distance(after_a_good_step(backend), clean) == 0.0


@pytest.mark.parametrize("bad", [*DATUM_ROWS, *LOSS_ROWS], ids=lambda bad: bad.name)
def test_gradients_before_bad_input_survive(bad: Bad) -> None:
    """What had accumulated before the bad call is there after it."""
    if bad.action is mixed:
        pytest.skip("this one begins an accumulation of its own")
    backend = tiny_backend()
    backend.forward_backward(DATA, PPO()).result()
    before = backend.gradients()
    with pytest.raises(PullbackError):
        bad.action(backend)
    assert distance(backend.gradients(), before) == 0.0


def test_at_least_sixty_kinds() -> None:
    """The table is as long as promised, and no kind is in it twice."""
    assert len({bad.name for bad in ROWS}) == len(ROWS) >= 60


def test_broken_weights_name_datum_and_token() -> None:
    """NaN in the model's weights is reported where it first shows."""
    backend = tiny_backend()
    with torch.no_grad():
        next(iter(backend.model.parameters()))[int(DATA[1].model_input.tokens[1])] = NAN
    with pytest.raises(NonFiniteError, match=r"datum \d: the model gives target token \d"):
        backend.forward_backward(DATA, "ppo").result()
