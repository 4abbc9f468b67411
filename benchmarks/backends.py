"""One script on several backends: native, a service of our own, and any other, side by side."""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import pullback
from pullback import AdamParams, Datum, TorchBackend
from pullback.backends.native.models.lora import LoraChoice
from pullback.service import Base
from pullback.testing import smollm2_folder

from .custom import nll
from .models import batch, load
from .serving.services import Wire, own_service, relay
from .timing import Report, Times, interleave

__all__ = ["run"]

OPERATIONS = ("forward", "built-in", "custom", "optimizer", "step")
_PARAMS = AdamParams(learning_rate=1e-7)  # the weights stay where they are, for all practical purposes
_SEED = 0


@dataclass
class Side:
    """A backend under measurement.

    Attributes:
        wire: bytes of each operation (up, down), where they can be counted.
        differs: largest difference of its log-probs from the native ones, nats.
    """

    name: str
    backend: Any
    data: list[Datum]
    wire: dict[str, tuple[int, int]] = field(default_factory=dict)
    differs: float | None = None

    def work(self, operation: str) -> Callable[[], object]:
        """One operation, waited for."""
        backend, data = self.backend, self.data

        def step() -> object:
            sent = backend.forward_backward(data, "cross_entropy")
            done = backend.optim_step(_PARAMS)
            return sent.result(), done.result()

        return {
            "forward": lambda: backend.forward(data).result(),
            "built-in": lambda: backend.forward_backward(data, "cross_entropy").result(),
            "custom": lambda: backend.forward_backward_custom(data, nll).result(),
            "optimizer": lambda: backend.optim_step(_PARAMS).result(),
            "step": step,
        }[operation]


def run(arguments: Any) -> None:
    """Measure all sides, print, draw."""
    os.environ.setdefault("TINKER_TELEMETRY", "0")  # it would be counted
    report = Report("backends")
    with ExitStack() as stack:
        base = stack.enter_context(_base(arguments.model))
        lora = LoraChoice(arguments.rank, _SEED, train_unembed=arguments.unembed)
        native = TorchBackend(base.adapted(lora), token_budget=arguments.token_budget)
        data = batch([arguments.length] * arguments.sequences, native.vocab_size, prompt_share=0.0)
        own = stack.enter_context(own_service(base.tokenizer_id or "", base.name, arguments.token_budget))
        services = {"our service": (own.url, base.name)}
        services |= {url: (url, arguments.base_model or base.name) for url in arguments.url}
        sides = [Side("native", native, data)]
        sides += [stack.enter_context(_side(name, *place, lora, data)) for name, place in services.items()]
        _agree(sides)
        times = _timed(sides, arguments.rounds)
        for operation in OPERATIONS:
            report.add(operation, times[operation], "native", _facts(operation, times[operation], sides))
    _summary(sides, times)
    _draw(Path(arguments.out), sides, times, f"{arguments.model}, {arguments.sequences} x {arguments.length} tokens")
    report.close()


def _timed(sides: Sequence[Side], rounds: int) -> dict[str, Times]:
    """Time all operations of all sides in turn, so that every optimizer step has a gradient; return them by operation."""
    works = {f"{o}: {side.name}": side.work(o) for o in OPERATIONS for side in sides}
    found = interleave(works, rounds)

    def of(operation: str, rows: dict[str, list[float]]) -> dict[str, list[float]]:
        return {side.name: rows[f"{operation}: {side.name}"] for side in sides}

    return {o: Times(of(o, found.seconds), of(o, found.others)) for o in OPERATIONS}


@contextmanager
def _base(model: str) -> Iterator[Base]:
    """The base, in a folder that a service can load."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    if model == "smollm2":
        folder = smollm2_folder()
        yield Base(model, transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), str(folder))
        return
    tiny: Any = load(model, lora=None).model
    with tempfile.TemporaryDirectory() as place:
        tiny.model.save_pretrained(place)
        yield Base(model, transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32), place)


@contextmanager
def _side(name: str, url: str, base_model: str, lora: LoraChoice, data: list[Datum]) -> Iterator[Side]:
    options = {"seed": lora.seed, "train_unembed": lora.train_unembed}

    def connect(place: str) -> Any:
        return pullback.connect(place, base_model=base_model, rank=lora.rank, lora=options)

    with connect(url) as backend:
        side = Side(name, backend, data)
        if url.startswith("http://"):
            with relay(url) as (place, wire), connect(place) as counted:
                side.wire = _count(Side(name, counted, data), wire)
        yield side


def _count(side: Side, wire: Wire) -> dict[str, tuple[int, int]]:
    found = {}
    for operation in ("forward", "built-in", "custom", "optimizer"):
        wire.take()
        side.work(operation)()
        found[operation] = wire.take()
    return found


def _agree(sides: Sequence[Side]) -> None:
    native, *others = [torch.cat([o["logprobs"].to_torch() for o in _outputs(side)]) for side in sides]
    for side, found in zip(sides[1:], others, strict=True):
        side.differs = float((found - native).abs().max())


def _outputs(side: Side) -> Any:
    return side.backend.forward(side.data).result().loss_fn_outputs


def _facts(operation: str, times: Times, sides: Sequence[Side]) -> dict[str, Any]:
    facts: dict[str, Any] = {"tokens": sum(len(d.model_input) for d in sides[0].data)}
    for side in sides[1:]:
        facts[f"{side.name} overhead ms"] = round(overhead(times, side.name), 1)
        if operation in side.wire:
            facts[f"{side.name} bytes up, down"] = side.wire[operation]
        facts[f"{side.name} largest log-prob difference"] = side.differs
    return facts


def overhead(times: Times, name: str) -> float:
    """Median of the paired differences from native, ms."""
    pairs = zip(times.seconds[name], times.seconds["native"], strict=True)
    return 1e3 * statistics.median(a - b for a, b in pairs)


def _summary(sides: Sequence[Side], times: dict[str, Times]) -> None:
    tokens = sum(len(d.model_input) for d in sides[0].data)
    columns = ["tokens/s"] + [f"{o} ms" for o in OPERATIONS] + ["overhead ms", "custom/built-in", "kB/step", "log-prob"]
    print("\n" + " " * 24 + "".join(f"{c:>17}" for c in columns))
    for side in sides:
        middle = [1e3 * statistics.median(times[o].seconds[side.name]) for o in OPERATIONS]
        pairs = zip(times["custom"].seconds[side.name], times["built-in"].seconds[side.name], strict=True)
        row = [f"{1e3 * tokens / middle[-1]:.0f}", *(f"{x:.1f}" for x in middle)]
        row += [f"{overhead(times['step'], side.name):.1f}", f"{statistics.median(a / b for a, b in pairs):.3f}"]
        moved = [sum(side.wire[o]) for o in ("built-in", "optimizer") if o in side.wire]
        row += [f"{sum(moved) / 1e3:.1f}" if moved else "-", "-" if side.differs is None else f"{side.differs:.1e}"]
        print(f"{side.name[:23]:24}" + "".join(f"{x:>17}" for x in row))


def _draw(path: Path, sides: Sequence[Side], times: dict[str, Times], title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8.0, 4.2), layout="constrained")
    width = 0.8 / len(sides)
    for i, (side, color) in enumerate(zip(sides, ("#1f5fa8", "#c0622d", "#4a8c4a", "#7a5ba8") * 9, strict=False)):
        at = [x + i * width for x in range(len(OPERATIONS))]
        middle = [statistics.median(times[o].seconds[side.name]) for o in OPERATIONS]
        ends = [[times[o].quantile(side.name, q) for o in OPERATIONS] for q in (2, 8)]
        errors = [[max(0.0, m - low) for m, low in zip(middle, ends[0], strict=True)],
                  [max(0.0, high - m) for m, high in zip(middle, ends[1], strict=True)]]  # fmt: skip
        bars = axis.bar(at, middle, width, yerr=errors, label=side.name, color=color, ecolor="#555555", capsize=2)
        axis.bar_label(bars, [f"{1e3 * m:.0f}" for m in middle], padding=2, fontsize=7)
    axis.set_xticks([x + 0.4 - width / 2 for x in range(len(OPERATIONS))], OPERATIONS)
    axis.set_ylabel("seconds (bars: medians, in ms; lines: p20 to p80)")
    axis.set_ylim(bottom=0)
    axis.set_title(title, loc="left", fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    print(f"picture in {path}")
