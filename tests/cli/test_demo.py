"""The demo's script on a native backend and on a service: the same losses, and the same adapters at the end."""

from __future__ import annotations

import io
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from helpers import distance, weights_of
from rich.console import Console
from servers import SDK_WARNINGS, served

from pullback.cli.demo import run
from pullback.cli.demo.backends import native
from pullback.cli.demo.backends import served as connected
from pullback.cli.demo.data import own_tasks
from pullback.cli.demo.models import tiny
from pullback.cli.demo.objectives import objectives
from pullback.cli.demo.planning import plan_steps
from pullback.cli.demo.report import Curve, print_table
from pullback.cli.demo.run import NAMES, train
from pullback.cli.processes import Processes
from pullback.service import ServedModels, serving

pytestmark = SDK_WARNINGS
STEPS = 20
MARKS = {"sft": (), "grpo": (pytest.mark.slow,)}  # of the others, each has its sample in one of these two


@pytest.mark.parametrize("name", [pytest.param(n, marks=MARKS.get(n, (pytest.mark.soak,))) for n in NAMES])
def test_one_script_on_both_backends(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Over 20 steps every metric, then the held-out figures and the adapters: they agree to 1e-5 in fp32."""
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    model = tiny("cpu")
    models = ServedModels(model.base, tmp_path)
    with serving(models) as url, connected(model, url) as remote, native(model) as backend:
        (ours,), (theirs,) = (objectives(model, own_tasks(model, 0), 0, [name]) for _ in range(2))
        ours.prepare(backend)
        theirs.prepare(remote)
        for step in range(STEPS):
            expected = ours.step(backend, ours.params(step, STEPS))
            actual = theirs.step(remote, theirs.params(step, STEPS))
            shared = {key: expected[key] for key in expected if key in actual}
            assert "loss:sum" in shared
            tolerance = 1e-7 * shared["tokens:sum"]  # a sum over tokens may cancel
            assert {key: actual[key] for key in shared} == pytest.approx(shared, rel=1e-5, abs=tolerance)
        assert theirs.evaluate(remote) == pytest.approx(ours.evaluate(backend), rel=1e-5, abs=1e-6)
        assert distance(weights_of(served(models, remote.trainer)), weights_of(backend)) < 1e-5


def test_a_figure_of_every_step_and_nothing_wraps_in_80_columns() -> None:
    """The training curve has one point a step; a row of the table is one line of the terminal."""
    model = tiny("cpu")
    lines = io.StringIO()
    console = Console(file=lines, width=80)
    curves = []
    for objective in objectives(model, own_tasks(model, 0), 0, ["sft", "orpo"]):
        curves.append(train(lambda: native(model), objective, plan_steps(0.0, 1.0, 1.0, (2, 2)), console))
    for curve in curves:
        assert len(curve.training) == curve.steps[-1] == 2
        # The first batch is measured before the first update, as the held-out set is at step 0.
        assert curve.training[0] == pytest.approx(curve.points[0][curve.measure], abs=0.5)
    print_table(console, [*curves, _widest()])
    rows = [line for line in lines.getvalue().splitlines() if line.strip()]
    assert [line for line in rows if len(line) > 80] == []
    assert any("GRPO: KL beta = 0.04" in line and "12345" in line for line in rows), "a title is not cut or wrapped"


def _widest() -> Curve:
    points = [{"reward": 0.0, "kl_per_answer": -10.0}, {"reward": 1.0, "kl_per_answer": 100.0}]
    return Curve("grpo", "GRPO: KL beta = 0.04", "reward", "mean reward", 1, 30, 12345.0, [0, 30], points, [0.0] * 30)


@pytest.mark.parametrize(
    ("products", "steps", "chosen"),
    [
        ({"float32": 1.0, "bfloat16": 999.0}, {}, "float32"),  # no instructions for bfloat16: no step is tried
        ({"float32": 1.0, "bfloat16": 0.5}, {"float32": 2.0, "bfloat16": 1.0}, "bfloat16"),
        ({"float32": 1.0, "bfloat16": 0.5}, {"float32": 1.0, "bfloat16": 2.0}, "float32"),
    ],
)
def test_half_precision_is_tried_where_its_products_are_faster(
    products: dict[str, float], steps: dict[str, float], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And taken where its whole steps are."""
    tried: list[str] = []

    def measured(make: Any, dtype: str) -> tuple[float, float]:
        tried.append(dtype)
        return steps[dtype], 0.0

    monkeypatch.setattr(run, "_product_seconds", lambda dtype: products[str(dtype).removeprefix("torch.")])
    monkeypatch.setattr(run, "pretrained", lambda name, device, dtype: dtype)
    monkeypatch.setattr(run, "_sft", lambda model, seed: model)
    monkeypatch.setattr(run, "_measure", measured)
    lines = io.StringIO()
    loaded: Any = run._load_model(
        Namespace(device="cpu", model="smollm2", seed=0), Console(file=lines, width=80), Processes()
    )
    assert loaded == chosen
    assert tried == list(steps)
    assert lines.getvalue().strip().endswith(chosen)
    assert len(lines.getvalue().splitlines()) == 2, "nothing wraps in 80 columns"
