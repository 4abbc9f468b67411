"""`diff` says where two backends part, and leaves them as they were."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffed import DATA, named, squares, verdicts
from helpers import make_data, tiny_llama, weights_of
from hypothesis import given
from hypothesis import strategies as st
from planted import TableLM, detached, reporting, scaled, scoring, signalling, stepping, unreadable
from torch import Tensor

from pullback.backends import AdamParams, FakeBackend, TorchBackend
from pullback.backends.preserve import preserved
from pullback.datums import Datum
from pullback.errors import BackendError, DatumError, UnsupportedError
from pullback.losses import GRPO, get_loss
from pullback.testing import TOLERANCES, TinyLM, diff
from pullback.testing.backend_diff import STAGES

LOSSES = ["cross_entropy", "ppo", "grpo", "dpo", "orpo"]


def exact() -> TorchBackend:
    return TorchBackend(TinyLM())


def table() -> TorchBackend:
    return TorchBackend(TableLM(FakeBackend().table))


@pytest.mark.parametrize("loss", [*LOSSES, GRPO(), squares], ids=named)
@pytest.mark.parametrize(
    "pair", [(exact, exact), (FakeBackend, FakeBackend), (table, FakeBackend), (FakeBackend, table)]
)
def test_the_same_model_does_not_diverge(loss: Any, pair: tuple[Callable[[], Any], Callable[[], Any]]) -> None:
    """A backend and itself, and the native and the fake backend on one table, agree in every stage."""
    found = diff(pair[0](), pair[1](), loss, DATA)
    assert not found.diverges, str(found)
    assert verdicts(found) == ["same"] * 5
    assert "no divergence" in str(found)
    assert found.left == ""


def test_one_backend_is_both_sides() -> None:
    """A backend can be compared with itself, the same object."""
    backend = exact()
    assert not diff(backend, backend, "grpo", DATA).diverges


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("lora", [None, 4], ids=["whole", "adapter"])
def test_half_precision_is_within_the_table(dtype: torch.dtype, lora: int | None) -> None:
    """A half-precision copy agrees with fp32 by the table of its dtype; by that of fp32 it does not."""
    fine, coarse = (TorchBackend(tiny_llama(each, lora=lora)) for each in (torch.float32, dtype))
    found = diff(fine, coarse, "cross_entropy", DATA)
    assert not found.diverges, str(found)
    assert found.dtypes == ("float32", str(dtype)[6:])
    strict = diff(fine, coarse, "cross_entropy", DATA, tolerance=TOLERANCES["float32"])
    assert strict.first is not None
    assert strict.first.stage == "logprobs"


def test_tolerances_grow_with_the_rounding() -> None:
    """A less precise dtype is allowed more, of everything."""
    rows = [TOLERANCES[name] for name in ("float64", "float32", "float16", "bfloat16")]
    for finer, coarser in pairwise(rows):
        assert all(getattr(finer, name) < getattr(coarser, name) for name in ("largest", "mean", "gradient", "update"))


PLANTED: dict[str, tuple[str, Callable[[], Any], Callable[[], Any]]] = {
    "log-probs": ("logprobs", FakeBackend, lambda: FakeBackend(seed=1)),
    "the reported loss": ("loss", FakeBackend, lambda: reporting(2.0)),
    "cotangents": ("cotangent", FakeBackend, lambda: signalling(lambda c, call, i: c / 3)),
    "one layer": ("gradient", exact, lambda: scaled(lambda name: name == "blocks.1.down", 1.5)),
    "a detached block": ("gradient", exact, lambda: detached(1)),
    "the learning rate": ("update", exact, lambda: stepping(exact(), learning_rate=lambda x: 2 * x)),
    "clipping": ("update", FakeBackend, lambda: stepping(FakeBackend(), grad_clip_norm=1e-9)),
}


@pytest.mark.parametrize("what", PLANTED)
def test_the_first_divergence_is_found(what: str) -> None:
    """A planted difference shows in its own stage: those before agree, those after are not reached."""
    stage, a, b = PLANTED[what]
    found = diff(a(), b(), "cross_entropy", DATA)
    place = STAGES.index(stage)
    assert verdicts(found) == ["same"] * place + ["differs"], str(found)
    assert found.first is not None
    assert found.first.stage == stage
    assert found.cause
    assert str(found).count("not reached") == len(STAGES) - place - 1


@pytest.mark.parametrize("k", [1 / 15, 7.0, -1.0])
def test_gradients_that_cannot_be_read(k: float) -> None:
    """They are compared by the change of log-probs by a step along them, in which a factor shows as a factor."""
    assert not diff(FakeBackend(), unreadable(FakeBackend()), "cross_entropy", DATA).diverges
    assert not diff(unreadable(FakeBackend()), unreadable(FakeBackend()), "ppo", DATA).diverges
    other = unreadable(FakeBackend())
    backward = other._fake.model.backward
    object.__setattr__(other._fake.model, "backward", lambda request, c: k * backward(request, c))
    found = diff(FakeBackend(), other, "cross_entropy", DATA)
    assert found.first is not None
    assert found.first.stage == "gradient"
    assert found.first.figures["factor"] == pytest.approx(k, rel=2e-2)
    assert {7.0: "a coefficient", -1.0: "the sign"}.get(
        k, "b divides by the number of trained tokens (15)"
    ) in found.cause


def test_tokens_are_named() -> None:
    """The report says which datum and token, with its text where there is a tokenizer, and both numbers."""

    class Letters:
        def decode(self, ids: list[int]) -> str:
            return "".join(chr(97 + i) for i in ids)

    def one_token(scores: list[Tensor], call: Any) -> list[Tensor]:
        longer = max(range(len(scores)), key=lambda i: len(scores[i]))
        return [x - 0.5 * ((i == longer) * torch.arange(len(x)) == 2) for i, x in enumerate(scores)]

    found = diff(FakeBackend(), scoring(one_token), "cross_entropy", DATA, tokenizer=Letters())
    (token,) = found.token_diffs
    target = int(DATA[2].loss_fn_inputs["target_tokens"].to_torch()[2])
    assert (found.tokens_differing, token.datum, token.position, token.target) == (1, 2, 2, target)
    assert (token.token, token.text) == (DATA[2].model_input.to_ints()[2], chr(97 + target))
    assert token.a - token.b == pytest.approx(0.5)
    assert f"{target} {chr(97 + target)!r}" in str(found)


def test_the_result_is_json() -> None:
    """Every number is there, what is not finite as text."""
    found = json.loads(diff(FakeBackend(), FakeBackend(seed=2), "ppo", DATA).to_json())
    assert (found["diverges"], found["first"], len(found["token_diffs"])) == (True, "logprobs", 12)
    assert found["stages"][0]["figures"]["largest"] > 1

    def broken(scores: list[Tensor], call: Any) -> list[Tensor]:
        return [
            torch.where(torch.arange(len(x)) == 0, math.nan, x) for x in scores
        ]  # untrained, or it would be refused

    found = json.loads(diff(FakeBackend(), scoring(broken), "ppo", DATA).to_json())
    assert (found["token_diffs"][0]["b"], found["stages"][0]["figures"]["largest"]) == ("nan", "inf")
    assert "NaN or infinity in datums [0, 1, 2, 3]" in found["cause"]


def trained(backend: Any, seed: int) -> None:
    backend.forward_backward(make_data([4, 3], seed=seed), "grpo").result()
    backend.optim_step(AdamParams(1e-2)).result()


def state(backend: Any) -> dict[str, Tensor]:
    weights = {"table": backend.table} if isinstance(backend, FakeBackend) else weights_of(backend)
    return {**weights, **{f"gradient {name}": g.clone() for name, g in backend.gradients().items()}}


MAKERS: dict[str, Callable[[], Any]] = {
    "fake": FakeBackend,
    "exact": exact,
    "half": lambda: TorchBackend(tiny_llama(torch.bfloat16)),
    "adapter": lambda: TorchBackend(tiny_llama(torch.float32, lora=2)),
}
CHEAP = ("fake", "exact")


@pytest.mark.parametrize("kind", [*CHEAP, *(pytest.param(k, marks=pytest.mark.slow) for k in MAKERS if k not in CHEAP)])
@given(steps=st.integers(0, 2), calls=st.integers(0, 2), diverges=st.booleans())
def test_backends_are_left_as_they_were(kind: str, steps: int, calls: int, diverges: bool) -> None:
    """A run with a comparison in the middle ends with the weights, to the bit, of one that was left alone."""
    left_alone, compared = MAKERS[kind](), MAKERS[kind]()
    for backend in (left_alone, compared):
        for seed in range(steps):
            trained(backend, seed)
        for seed in range(calls):
            backend.forward_backward(make_data([6, 2], seed=seed), "dpo").result()
    other = stepping(MAKERS[kind](), learning_rate=0.1) if diverges else MAKERS[kind]()
    found = diff(compared, other, "dpo", DATA)
    assert found.left == ""
    assert compared.weights_version == steps
    for backend in (left_alone, compared):
        if calls:
            assert backend.optim_step(AdamParams(1e-2)).result().stepped
        trained(backend, 7)
    ends = state(left_alone), state(compared)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_trace_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: without the snapshot, a comparison trains."""
    monkeypatch.setattr("pullback.testing.backend_diff.sides.preserved", lambda backend, weights: nullcontext())
    left_alone, compared = exact(), exact()
    diff(compared, exact(), "dpo", DATA)
    assert not torch.equal(weights_of(left_alone)["embedding"], weights_of(compared)["embedding"])


@pytest.mark.parametrize("kind", [*CHEAP, *(pytest.param(k, marks=pytest.mark.slow) for k in MAKERS if k not in CHEAP)])
def test_a_failure_leaves_no_trace(kind: str) -> None:
    """What fails inside `preserved` undoes nothing of it."""
    backend = MAKERS[kind]()
    trained(backend, 0)
    backend.forward_backward(DATA, "dpo").result()
    before = state(backend)

    def work() -> None:
        with preserved(backend):
            assert backend.gradients() == {}
            trained(backend, 1)
            raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        work()
    after = state(backend)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert backend.optim_step(AdamParams()).result().normalization == "pairs over 1 call"


def test_retained_forwards_end_with_a_step() -> None:
    """A forward that was retained before a step was tried is refused, as after any step; without a step it serves."""
    backend = exact()
    for weights in (False, True):
        retained = backend.forward_retain(DATA).result()
        with preserved(backend, weights=weights):
            backend.forward_backward(DATA, "dpo").result()
            if weights:
                backend.optim_step(AdamParams()).result()
        later = backend.backward({retained: range(4)}, DATA, "dpo")
        assert isinstance(later.exception(), BackendError) == weights


class Foreign:
    """A backend that has the verbs of the protocol, and nothing else."""

    def __init__(self, backend: Any) -> None:
        for verb in (
            "forward",
            "forward_backward",
            "forward_backward_custom",
            "optim_step",
            "discard_gradients",
            "plan",
        ):
            setattr(self, verb, getattr(backend, verb))


@pytest.mark.parametrize("loss", ["grpo", squares], ids=named)
def test_a_backend_of_somebody_else(loss: Any) -> None:
    """The verbs are enough: without permission to see log-probs and loss, with it to see all but the cotangents."""
    backend: Any = Foreign(FakeBackend())
    found = diff(FakeBackend(), backend, loss, DATA)
    assert verdicts(found) == ["same", "same" if loss == "grpo" else "not compared", *["not compared"] * 3]
    found = diff(FakeBackend(), backend, loss, DATA, allow_step=True)
    assert (
        [s.stage for s in found.stages if s.verdict == "same"] == [*STAGES]
        if loss == "grpo"
        else [*STAGES[:2], *STAGES[3:]]
    )
    assert "b: optimizer steps were made" in found.left


def test_what_is_refused() -> None:
    """No data, and a loss that one side cannot compute, are errors and no divergence."""
    with pytest.raises(DatumError, match="at least one datum"):
        diff(exact(), exact(), "dpo", [])
    bare = [Datum(d.model_input, {"target_tokens": d.loss_fn_inputs["target_tokens"]}) for d in DATA]
    with pytest.raises(UnsupportedError, match="a refuses dpo on this data: missing required field 'weights'"):
        diff(exact(), exact(), "dpo", bare)


def test_losses_are_known() -> None:
    """The losses of these tests are registered."""
    assert all(get_loss(name) for name in LOSSES)
