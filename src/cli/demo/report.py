"""The results of the demo: a table, a picture, and the figures as JSON."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, final

import torch

from ...errors import require_extra

__all__ = ["Curve", "draw_picture", "print_table", "write_figures"]

_PANEL_EXTRA = {"sft": None, "dpo": "accuracy", "orpo": "accuracy", "grpo": "kl_per_token"}
_EXTRA_LABEL = {"accuracy": "held-out accuracy", "kl_per_token": "KL to base, nats per token (k3)"}


@final
@dataclass
class Curve:
    """The figures of one objective over its steps: held-out ones now and then, and one of each step's own batch."""

    name: str
    title: str
    measure: str
    unit: str
    better: int
    planned_steps: int = 0
    seconds: float = 0.0
    steps: list[int] = field(default_factory=list)
    points: list[dict[str, float]] = field(default_factory=list)
    training: list[float] = field(default_factory=list)

    def values(self, key: str) -> list[float]:
        """Return one figure over the evaluations."""
        return [point[key] for point in self.points]

    @property
    def improved(self) -> bool:
        """Whether the measure moved in the right direction."""
        first, last = self.points[0][self.measure], self.points[-1][self.measure]
        return (last - first) * self.better > 0


def print_table(console: Any, curves: Sequence[Curve]) -> None:
    """Print the first and last value of every figure."""
    rich = require_extra("rich.table", "cli", "the demo")
    table = rich.Table(
        title="Held-out figures", box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False
    )
    for column, justify in (("objective", "left"), ("steps", "right"), ("seconds", "right"), ("figure", "left"),
                            ("start", "right"), ("end", "right"), ("improved", "left")):  # fmt: skip
        table.add_column(column, justify=justify)
    for curve in curves:
        for i, key in enumerate(curve.points[0]):
            head = (curve.title, str(curve.steps[-1]), f"{curve.seconds:.0f}") if i == 0 else ("", "", "")
            verdict = ("yes" if curve.improved else "NO") if key == curve.measure else ""
            table.add_row(*head, key, f"{curve.points[0][key]:z.3f}", f"{curve.points[-1][key]:z.3f}", verdict)
    console.print(table)


def write_figures(path: Path, curves: Sequence[Curve], settings: Mapping[str, Any]) -> None:
    """Write every figure, the settings and the versions."""
    document = {
        "settings": dict(settings),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "objectives": [{**asdict(curve), "improved": curve.improved} for curve in curves],
    }
    path.write_text(json.dumps(document, indent=1))


def draw_picture(path: Path, curves: Sequence[Curve], title: str) -> None:
    """Draw one panel per objective, with its measure and, on a second axis, accuracy or KL."""
    matplotlib = require_extra("matplotlib", "plot", "the demo's picture")
    matplotlib.use("Agg")
    plt = require_extra("matplotlib.pyplot", "plot", "the demo's picture")
    columns = min(2, len(curves))
    rows = -(-len(curves) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(5.6 * columns, 3.9 * rows), squeeze=False, layout="constrained")
    for axis in grid.flat[len(curves) :]:
        axis.set_visible(False)
    for axis, curve in zip(grid.flat, curves, strict=False):
        _panel(axis, curve)
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _panel(axis: Any, curve: Curve) -> None:
    main, other = "#1f5fa8", "#c0622d"
    values = curve.values(curve.measure)
    batches = range(1, len(curve.training) + 1)  # a step's figure is measured before its update
    axis.plot(batches, curve.training, color=main, alpha=0.35, linewidth=1, label="batch of the step")
    axis.plot(curve.steps, values, marker="o", color=main, linewidth=2, label="held out")
    offset = -14 if values[-1] > values[0] else 8  # so that the curve does not cross the first label
    for i, xytext in ((0, (6, offset)), (-1, (-6, 8))):
        axis.annotate(f"{values[i]:.2f}", (curve.steps[i], values[i]), textcoords="offset points", xytext=xytext,
                      ha="left" if i == 0 else "right", color=main, fontweight="bold")  # fmt: skip
    axis.set_title(curve.title, fontsize=11, loc="left")
    axis.set_xlabel("optimizer step")
    axis.set_ylabel(curve.unit, color=main)
    axis.legend(fontsize=8, loc="best", frameon=False)
    axis.margins(y=0.2)
    axis.grid(alpha=0.25)
    axis.spines["top"].set_visible(False)
    extra = _PANEL_EXTRA[curve.name]
    if extra is None:
        axis.spines["right"].set_visible(False)
        return
    twin = axis.twinx()
    twin.plot(curve.steps, curve.values(extra), marker="s", markersize=4, color=other, linewidth=1.2, linestyle="--")
    twin.set_ylabel(_EXTRA_LABEL[extra], color=other)
    twin.spines["top"].set_visible(False)
    twin.margins(y=0.2)
    if extra == "accuracy":
        twin.set_ylim(-0.05, 1.08)
