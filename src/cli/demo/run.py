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
from ..arguments.models import default_device
from ..processes import ALONE, Processes
from .backends import MakeBackend, backend_maker, native
from .data import DemoData, own_tasks, rows_of_files
from .models import DemoModel, pretrained, tiny
from .objectives import Objective, objectives
from .planning import Budget, plan_steps
from .report import Curve, draw_picture, print_table, write_figures

__all__ = ["main", "train"]

NAMES = ("sft", "dpo", "orpo", "grpo")
_PLANNED_SHARE = 0.8  # of the time left; the rest is for loading and for what the measurement missed


def main(arguments: argparse.Namespace) -> int:
    """Run ``pullback demo``; 0 if every objective improved on its held-out set."""
    started = time.monotonic()
    processes = Processes.here(_device(arguments))
    if processes.ranks is not None and arguments.backend == "remote":
        raise ConfigError("--backend remote starts a service of one process; start the demo without torchrun")
    console = require_extra("rich.console", "cli", "pullback demo").Console(quiet=not processes.first)
    only = arguments.only.split(",") if arguments.only else []
    if unknown := sorted(set(only) - set(NAMES)):
        raise ConfigError(f"--only takes {', '.join(NAMES)}; got {', '.join(unknown)}")
    model = _load_model(arguments, console, processes)
    data = _data(arguments, model, console)
    names = only or data.names
    threads = torch.get_num_threads()
    console.print(
        f"[bold]{model.name}[/bold]\n{arguments.backend} backend, {model.device}, {model.dtype}, "
        f"{threads} thread{'s' if threads > 1 else ''}"
    )
    with backend_maker(model, arguments.backend) as make:
        planned = _plan(model, data, make, arguments, names, started, console, processes)
        curves = [train(make, objective, budget, console, processes) for objective, budget in planned]
    if processes.first:
        _report(arguments, model, curves, time.monotonic() - started, console)
    return int(any(not curve.improved for curve in curves))


def _device(arguments: argparse.Namespace) -> str:
    device: str = default_device() if arguments.device == "auto" else arguments.device
    return device


def _data(arguments: argparse.Namespace, model: DemoModel, console: Any) -> DemoData:
    if not arguments.data:
        return own_tasks(model, arguments.seed)
    say = partial(console.print, soft_wrap=True, markup=False, highlight=False)
    return rows_of_files(model, [Path(path) for path in arguments.data], arguments.seed, say)


def _load_model(arguments: argparse.Namespace, console: Any, processes: Processes) -> DemoModel:
    device = _device(arguments)
    if arguments.model == "tiny":
        torch.set_num_threads(1)  # threads would spend their time waiting for each other
        return tiny(device)
    first = " (the first time it is converted: about 20 seconds)" if arguments.model == "smollm2" else ""
    console.print(f"Loading the model{first}")
    if device.startswith("cuda"):
        return pretrained(arguments.model, device, "bfloat16")
    # Without instructions for bfloat16 a processor takes many times as long in it: then no whole step is tried.
    slower = processes.same(_product_seconds(torch.bfloat16) / _product_seconds(torch.float32))
    if slower > 1.0:
        console.print(f"Products of matrices take {slower:.1f} times as long in bfloat16 -> float32")
        return pretrained(arguments.model, device, "float32")
    seconds = {}
    for dtype in ("float32", "bfloat16"):
        model = pretrained(arguments.model, device, dtype)
        seconds[dtype] = _measure(partial(native, model), _sft(model, arguments.seed))[0]
    fastest = processes.same(min(seconds, key=lambda dtype: seconds[dtype]))
    console.print(
        f"One SFT step: {seconds['float32']:.1f} s in float32, {seconds['bfloat16']:.1f} s in bfloat16 -> {fastest}"
    )
    return pretrained(arguments.model, device, fastest)


def _product_seconds(dtype: torch.dtype) -> float:
    """Return the seconds of a product of matrices of a small model's size; the best of three, after one to warm up."""
    left, right = torch.ones(128, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    return min([_timed(lambda: left @ right) for _ in range(4)][1:])


def _sft(model: DemoModel, seed: int) -> Objective:
    return objectives(model, own_tasks(model, seed), seed, ["sft"])[0]


def _measure(make: MakeBackend, objective: Objective) -> tuple[float, float]:
    """Return the seconds of one step and of one evaluation, measured on a backend that is used for nothing else."""
    with make() as backend:
        params = objective.params(0, 1)
        objective.prepare(backend)
        evaluation = _timed(lambda: objective.evaluate(backend))
        objective.step(backend, params)  # the first step is slower than the others
        return _timed(lambda: objective.step(backend, params)), evaluation


def _timed(work: Callable[[], object]) -> float:
    started = time.monotonic()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic() - started


def _plan(
    model: DemoModel,
    data: DemoData,
    make: MakeBackend,
    arguments: argparse.Namespace,
    names: Sequence[str],
    started: float,
    console: Any,
    processes: Processes,
) -> list[tuple[Objective, Budget]]:
    speeds = {o.name: _measure(make, o) for o in objectives(model, data, arguments.seed, names)}
    fresh = objectives(model, data, arguments.seed, names)
    seconds_left = _PLANNED_SHARE * (60.0 * arguments.minutes - (time.monotonic() - started))
    shares = sum(o.share for o in fresh)
    budgets = [plan_steps(seconds_left * o.share / shares, *speeds[o.name], o.steps) for o in fresh]
    agreed = processes.same([[b.steps, b.every, b.seconds] for b in budgets])
    planned = [
        (o, Budget(int(steps), int(every), seconds)) for o, (steps, every, seconds) in zip(fresh, agreed, strict=True)
    ]
    for objective, budget in planned:
        step, evaluation = speeds[objective.name]
        console.print(
            f"  {objective.title:20} {budget.steps:2} steps of {step:.2f} s, evaluation {evaluation:.2f} s, "
            f"at most {budget.seconds:.0f} s"
        )
    return planned


def _progress(console: Any) -> Any:
    """Return a bar of steps with the newest figure."""
    progress = require_extra("rich.progress", "cli", "pullback demo")
    columns = [
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=16),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[figure]}"),
    ]
    return progress.Progress(*columns, console=console)


def train(make: MakeBackend, objective: Objective, budget: Budget, console: Any, processes: Processes = ALONE) -> Curve:
    """Train one objective within its budget, and show the progress."""
    curve = Curve(objective.name, objective.title, objective.measure, objective.unit, objective.better, budget.steps)
    with make() as backend, _progress(console) as bars:
        bar = bars.add_task(f"{objective.title:20}", total=budget.steps, figure="")
        started = time.monotonic()
        objective.prepare(backend)

        def evaluate(step: int) -> None:
            curve.steps.append(step)
            curve.points.append(objective.evaluate(backend))
            bars.update(bar, figure=f"{objective.measure} {curve.points[-1][objective.measure]:.3f}")

        evaluate(0)
        for step in range(1, budget.steps + 1):
            metrics = objective.step(backend, objective.params(step - 1, budget.steps))
            curve.training.append(metrics[objective.training])
            bars.advance(bar)
            out_of_time = processes.same(time.monotonic() - started > budget.seconds) and step >= objective.steps[0]
            if step % budget.every == 0 or step == budget.steps or out_of_time:
                evaluate(step)
            if out_of_time:
                break
        curve.seconds = time.monotonic() - started
    return curve


def _report(arguments: argparse.Namespace, model: DemoModel, curves: list[Curve], seconds: float, console: Any) -> None:
    folder = Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        **vars(arguments),
        "model": model.name,
        "device": model.device,
        "dtype": model.dtype,
        "seconds": seconds,
    }
    settings.pop("run", None)
    write_figures(folder / "results.json", curves, settings)
    title = f"{model.name}, {model.device} {model.dtype}, {arguments.backend} backend, {seconds / 60:.1f} min"
    draw_picture(folder / "curves.png", curves, title)
    print_table(console, curves)
    console.print(
        f"{seconds / 60:.1f} minutes\nfigures: {folder / 'results.json'}\npicture: {folder / 'curves.png'}",
        soft_wrap=True,
    )
    failed = [curve.title for curve in curves if not curve.improved]
    if failed:
        console.print(f"[red]Not improved on the held-out set: {', '.join(failed)}[/red]")
