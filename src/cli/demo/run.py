"""The demo from end to end: measure, plan, train, report."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...errors import ConfigError, require_extra
from .models import Studio, smollm2, tiny
from .objectives import Objective, objectives
from .planning import Budget, plan_steps
from .report import Curve, draw_picture, print_table, write_figures
from .starts import Start, native, starting

__all__ = ["main"]

NAMES = ("sft", "dpo", "orpo", "grpo")
_RESERVE = 0.8  # of the time is planned; the rest is loading, and what the measurement did not see


def main(arguments: argparse.Namespace) -> int:
    """Run ``pullback demo``; 0 if every objective improved on its held-out set."""
    console = require_extra("rich.console", "cli", "pullback demo").Console()
    began = time.monotonic()
    names = arguments.only.split(",") if arguments.only else list(NAMES)
    unknown = sorted(set(names) - set(NAMES))
    if unknown:
        raise ConfigError(f"--only takes {', '.join(NAMES)}; got {', '.join(unknown)}")
    studio = _studio(arguments, console)
    console.print(
        f"[bold]{studio.name}[/bold] on {studio.device}, {studio.dtype}, {torch.get_num_threads()} threads, "
        f"{arguments.backend} backend"
    )
    with starting(studio, arguments.backend) as start:
        planned = _plan(studio, start, arguments, names, began, console)
        curves = [_train(start, objective, budget, console) for objective, budget in planned]
    return _report(arguments, studio, curves, time.monotonic() - began, console)


def _studio(arguments: argparse.Namespace, console: Any) -> Studio:
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.model == "tiny":
        torch.set_num_threads(1)  # it is so small that threads would only wait for each other
        return tiny(device)
    console.print("Loading the model (the first time it is converted: about 20 seconds)")
    if device == "cuda":
        return smollm2(device, "bfloat16")
    seconds = {}
    for dtype in ("float32", "bfloat16"):
        studio = smollm2(device, dtype)
        seconds[dtype] = _measure(partial(native, studio), objectives(studio, arguments.seed, ["sft"])[0])[0]
    best = min(seconds, key=lambda dtype: seconds[dtype])
    console.print(
        f"One SFT step: {seconds['float32']:.1f} s in float32, {seconds['bfloat16']:.1f} s in bfloat16 -> {best}"
    )
    return smollm2(device, best)


def _measure(start: Start, objective: Objective) -> tuple[float, float]:
    """Seconds of one step and of one evaluation, on a backend that is thrown away."""
    with start() as backend:
        params = objective.params(0, 1)
        objective.prepare(backend)
        evaluation = _timed(lambda: objective.evaluate(backend))
        objective.step(backend, params)  # the first step is slower than the others
        return _timed(lambda: objective.step(backend, params)), evaluation


def _timed(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic() - began


def _plan(
    studio: Studio, start: Start, arguments: argparse.Namespace, names: Sequence[str], began: float, console: Any
) -> list[tuple[Objective, Budget]]:
    speeds = {o.name: _measure(start, o) for o in objectives(studio, arguments.seed, names)}
    fresh = objectives(studio, arguments.seed, names)
    left = _RESERVE * (60.0 * arguments.minutes - (time.monotonic() - began))
    shares = sum(o.share for o in fresh)
    planned = [(o, plan_steps(left * o.share / shares, *speeds[o.name], o.steps)) for o in fresh]
    for objective, budget in planned:
        step, evaluation = speeds[objective.name]
        console.print(
            f"  {objective.title:24} {budget.steps:3} steps of {step:.2f} s, evaluations of {evaluation:.2f} s, "
            f"at most {budget.seconds:.0f} s"
        )
    return planned


def _train(start: Start, objective: Objective, budget: Budget, console: Any) -> Curve:
    progress = require_extra("rich.progress", "cli", "pullback demo")
    curve = Curve(objective.name, objective.title, objective.measure, objective.unit, objective.better, budget.steps)
    columns = [*progress.Progress.get_default_columns(), progress.TextColumn("{task.fields[figure]}")]
    with start() as backend, progress.Progress(*columns, console=console) as bars:
        bar = bars.add_task(f"{objective.title:24}", total=budget.steps, figure="")
        began = time.monotonic()
        objective.prepare(backend)

        def evaluate(step: int) -> None:
            curve.steps.append(step)
            curve.points.append(objective.evaluate(backend))
            bars.update(bar, figure=f"{objective.measure} {curve.points[-1][objective.measure]:.3f}")

        evaluate(0)
        for step in range(1, budget.steps + 1):
            objective.step(backend, objective.params(step - 1, budget.steps))
            bars.advance(bar)
            late = time.monotonic() - began > budget.seconds and step >= objective.steps[0]
            if step % budget.every == 0 or step == budget.steps or late:
                evaluate(step)
            if late:
                break
        curve.seconds = time.monotonic() - began
    return curve


def _report(arguments: argparse.Namespace, studio: Studio, curves: list[Curve], seconds: float, console: Any) -> int:
    folder = Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        **vars(arguments),
        "model": studio.name,
        "device": studio.device,
        "dtype": studio.dtype,
        "seconds": seconds,
    }
    settings.pop("run", None)
    write_figures(folder / "results.json", curves, settings)
    words = f"{studio.name}, {studio.device} {studio.dtype}, {arguments.backend} backend, {seconds / 60:.1f} min"
    draw_picture(folder / "curves.png", curves, words)
    print_table(console, curves)
    console.print(
        f"{seconds / 60:.1f} minutes; figures in {folder / 'results.json'}, picture in {folder / 'curves.png'}"
    )
    failed = [curve.title for curve in curves if not curve.improved]
    if failed:
        console.print(f"[red]Not improved on the held-out set: {', '.join(failed)}[/red]")
    return 1 if failed else 0
