"""Our backends keep every promise, and the suite notices a backend that breaks one."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_data, tiny_llama
from servers import KEY
from torch import Tensor

import pullback
from pullback.backends import (
    Backend,
    FakeBackend,
    PreparedCall,
    ScoreRequest,
    TorchBackend,
)
from pullback.backends.fake.engine import FakeEngine
from pullback.backends.fake.table import TableModel
from pullback.backends.operations.accumulation import Accumulation
from pullback.backends.operations.normalization import Divisor, Ledger
from pullback.backends.remote.capabilities import detect
from pullback.cli import main
from pullback.losses import get_loss
from pullback.testing import PROMISES, BackendUnderTest, TinyLM
from pullback.testing.conformance import run_check

DATA = make_data([5, 3, 7, 4])
# Of a transformers model, and over HTTP, the quick tier has a sample, and the slow one that of every theme.
FEW = ("scores_are_aligned", "gradients_match_the_loss", "mistakes_are_refused", "close_reports_failures")
SAMPLE = (
    *FEW,
    "one_normalizer",
    "failed_calls_block_the_step",
    "checkpoints_hold_everything",
    "models_are_isolated",
)


def tiered(marks: dict[str, tuple[Collection[str], list[pytest.MarkDecorator]]]) -> list[Any]:
    """Every kind with every promise: for each kind those of the quick tier, and the mark of what is in no sample."""

    def marked(promise: str, quick: Collection[str], others: list[pytest.MarkDecorator]) -> list[pytest.MarkDecorator]:
        return [] if promise in quick else [pytest.mark.slow] if promise in SAMPLE else others

    return [
        pytest.param(kind, promise, marks=marked(promise, quick, others))
        for kind, (quick, others) in marks.items()
        for promise in PROMISES
    ]


NATIVE = tiered(
    {
        "exact": (PROMISES, []),
        "llama": (FEW, [pytest.mark.soak]),
        "adapter": ((*FEW, "checkpoints_hold_everything"), [pytest.mark.slow]),
    }
)
REMOTE = tiered({"sent": ((*FEW, "one_normalizer"), [pytest.mark.slow]), "held": (FEW, [pytest.mark.soak])})


@pytest.mark.parametrize("promise", PROMISES)
def test_the_fake_backend(promise: str) -> None:
    """On a table, in closed form."""
    PROMISES[promise](BackendUnderTest(FakeBackend))


@pytest.mark.parametrize(("model", "promise"), NATIVE)
def test_the_native_backend(model: str, promise: str, tmp_path: Path) -> None:
    """On our exact model, and on transformers', whole and with an adapter."""
    makers: dict[str, Callable[[], Any]] = {
        "exact": TinyLM,
        "llama": lambda: tiny_llama(torch.float32),
        "adapter": lambda: tiny_llama(torch.float32, lora=4),
    }
    count = itertools.count()
    PROMISES[promise](
        BackendUnderTest(
            lambda: TorchBackend(makers[model](), checkpoint_dir=tmp_path / str(next(count)), token_budget=12)
        )
    )


@pytest.fixture
def connected(url: str, service: Any) -> Callable[[bool], BackendUnderTest]:
    def under_test(deferred: bool) -> BackendUnderTest:
        def make() -> Any:
            capabilities = detect(url, KEY, "tiny")
            return pullback.connect(
                service,
                base_model="tiny",
                rank=4,
                lora={"seed": 3},
                capabilities=capabilities,
                defer_backward=deferred,
            )

        return BackendUnderTest(make)

    return under_test


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize(("deferred", "promise"), REMOTE)
def test_the_remote_backend(connected: Callable[[bool], BackendUnderTest], deferred: str, promise: str) -> None:
    """Over HTTP, by the official SDK, on our own service."""
    PROMISES[promise](connected(deferred == "held"))


def _each_call_by_its_own_count(patch: pytest.MonkeyPatch) -> None:
    original = FakeEngine.accumulate

    def accumulate(self: FakeEngine, call: PreparedCall) -> Any:
        own = {"tokens": 13.0, "pairs": len(call.data) / 2, "sequences": float(len(call.data))}
        return original(self, call if call.denominator == "none" else replace(call, counts=own))

    patch.setattr(FakeEngine, "accumulate", accumulate)


def _applied_twice(patch: pytest.MonkeyPatch) -> None:
    adamw = TableModel.adamw
    patch.setattr(TableModel, "adamw", lambda self, g, p: (adamw(self, g, p), adamw(self, g, p)))


def _sign(patch: pytest.MonkeyPatch) -> None:
    backward = TableModel.backward
    patch.setattr(TableModel, "backward", lambda self, r, c: -backward(self, r, c))


def _first_token_lost(patch: pytest.MonkeyPatch) -> None:
    backward = TableModel.backward
    patch.setattr(TableModel, "backward", lambda self, r, c: backward(self, r, c * (torch.arange(len(c)) > 0)))


def _normalisation_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Ledger, "divisor", lambda self, mode: Divisor(1.0, "nothing"))


def _failures_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Accumulation, "require_complete", lambda self: None)


def _moments_not_saved(patch: pytest.MonkeyPatch) -> None:
    load = FakeEngine.load
    patch.setattr(FakeEngine, "load", lambda self, name, everything: load(self, name, False))


def _keys_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("pullback.backends.base.as_loss", lambda loss, config: get_loss(loss))


def _steps_on_nothing(patch: pytest.MonkeyPatch) -> None:
    adamw = TableModel.adamw
    step = Backend._step

    def stepped(self: Any, params: Any, mode: Any) -> Any:
        if self._accumulation.ledger.tokens == 0:
            adamw(self._fake.model, self._fake.model.logits, params)
        return step(self, params, mode)

    patch.setattr(Backend, "_step", stepped)


def _rows_leak(patch: pytest.MonkeyPatch) -> None:
    score = TableModel.score
    state = {"before": 0.0}

    def leaking(self: TableModel, request: ScoreRequest) -> Tensor:
        leaked = score(self, request) + 0.01 * state["before"]
        state["before"] = float(leaked[-1].detach())
        return leaked

    patch.setattr(TableModel, "score", leaking)


def _never_closes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FakeBackend, "close", lambda self: None)


def _functions_doubled(patch: pytest.MonkeyPatch) -> None:
    original = FakeEngine.accumulate

    def doubled(self: FakeEngine, call: PreparedCall) -> Any:
        if call.registered is not None:
            return original(self, call)
        return original(self, replace(call, loss=lambda d, x: (2 * call.loss(d, x)[0], {})))

    patch.setattr(FakeEngine, "accumulate", doubled)


BUGS = {
    "calls_add_up": _each_call_by_its_own_count,
    "gradients_match_the_loss": _sign,
    "every_token_counts": _first_token_lost,
    "one_normalizer": _normalisation_ignored,
    "failed_calls_block_the_step": _failures_forgotten,
    "checkpoints_hold_everything": _moments_not_saved,
    "mistakes_are_refused": _keys_ignored,
    "zero_weights_change_nothing": _steps_on_nothing,
    "scores_are_aligned": _rows_leak,
    "close_reports_failures": _never_closes,
    "functions_match_registered_losses": _functions_doubled,
}


@pytest.mark.parametrize("promise", BUGS)
def test_a_broken_promise_is_noticed(promise: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative controls: a bug for every promise."""
    BUGS[promise](monkeypatch)
    assert run_check(PROMISES[promise], BackendUnderTest(FakeBackend)).verdict == "failed"


def test_a_double_step_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: an update that is applied twice is not what the gradient says."""
    _applied_twice(monkeypatch)
    result = run_check(PROMISES["gradients_match_the_loss"], BackendUnderTest(FakeBackend))
    assert result.verdict == "failed"
    assert "twice" in result.cause


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`pullback check backend` prints a line for each check, writes both reports, and fails if a promise is broken."""
    markdown, machine = tmp_path / "report.md", tmp_path / "report.json"
    written = ["--markdown", str(markdown), "--json", str(machine)]
    few = ["--only", "gradients_match_the_loss", "--only", "retries_apply_once"]
    assert main(["check", "backend", "--kind", "fake", *few]) == 0
    assert "1 passed, 1 not applicable" in capsys.readouterr().out
    _sign(monkeypatch)
    assert main(["check", "backend", "--kind", "fake", *few, *written]) == 1
    assert "the loss fell by -1" in capsys.readouterr().out
    assert "the sign is lost" in markdown.read_text()
    report = json.loads(machine.read_text())
    assert [row["verdict"] for row in report["checks"]] == ["failed", "not applicable"]
    assert not report["conforms"]
    assert main(["check", "backend", "--kind", "fake", "--only", "gradients_match_the_los"]) == 2
    assert "did you mean 'gradients_match_the_loss'" in capsys.readouterr().err
