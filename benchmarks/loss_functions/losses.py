"""The losses alone, forward and backward, against padded code that people write by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor

from ..timing import Report, Times, interleave
from . import peers
from .hand_written import Inputs, MaskKind
from .works import HAND, HAND_COMPILED, ROWS, Row, Work, work, works

__all__ = ["check", "figures", "run"]

COLUMNS = ("float mask", "bool mask", "packed", "metrics read", "compiled", HAND_COMPILED)
SMALL = "16x256"  # takes a fiftieth of the large size's time, and its rounds scatter more
SMALL_REPEATS, SMALL_EXTRA_US = 20, 110.0


def check(name: str, row: Row, given: Inputs, columns: Mapping[str, Work]) -> None:
    """Check that every way gives the value and the gradient of the hand-written loss.

    Raises:
        AssertionError: names the loss, the column and both errors, which are relative to the largest value there.
    """
    exact = row.exact or row.hand
    loss, gradient = work(lambda x: exact(x, given), given.logprobs)()
    for column, way in columns.items():
        if column == HAND:
            continue
        found, slope = way()
        error = float((found - loss).abs() / loss.abs().clamp(min=1.0))
        slope_error = float((slope.reshape(-1) - gradient.reshape(-1)).abs().max() / gradient.abs().max())
        if not (error <= 1e-5 and slope_error <= 1e-5):
            raise AssertionError(f"{name}, {column}: loss off by {error:.1e}, gradient by {slope_error:.1e}")


def figures(times: Times, limits: Mapping[str, float], extra_us: float | None) -> dict[str, dict[str, Any]]:
    """Return each column's ratio, what it takes beyond its baseline, its target and whether that is met.

    Args:
        times: of the hand-written loss and each column.
        limits: largest ratio, by column.
        extra_us: what a padded column without a limit may take beyond the hand-written loss, microseconds.
    """
    found: dict[str, dict[str, Any]] = {}
    for column in (c for c in COLUMNS if c in times.seconds):
        baseline = "float mask" if column == "packed" else HAND
        one: dict[str, Any] = {"ms": 1e3 * times.quantile(column, 5), "ratio": times.ratio(column, baseline)}
        one["extra_us"] = 1e6 * times.difference(column, baseline)
        if column in limits:
            one |= {"target": limits[column], "met": one["ratio"] <= limits[column]}
        elif extra_us is not None and column in ("float mask", "bool mask"):
            one |= {"target_us": extra_us, "met": one["extra_us"] <= extra_us}
        found[column] = one
    return found


def cell(figure: Mapping[str, Any] | None) -> str:
    """Write a figure, its target and whether it is met."""
    if figure is None:
        return "-"
    if "reason" in figure:
        return "no" if figure["target"] is None else f"no (<= {figure['target']:g} missed)"
    if "met" not in figure:
        return f"{figure['ratio']:.2f}"
    met = "met" if figure["met"] else "missed"
    if "target" in figure:
        return f"{figure['ratio']:.2f} (<= {figure['target']:g} {met})"
    return f"{figure['ratio']:.2f} {figure['extra_us']:+.0f} us (<= {figure['target_us']:g} {met})"


def their_works(row: Row, given: Inputs, found: Mapping[Any, list[peers.Peer]]) -> dict[str, Work]:
    """Return what other libraries' functions are timed by, and say which of them fail."""
    known: dict[str, Work] = {}
    for peer in found.get(row.hand, []) if row.exact is None else []:
        try:
            attempt = work(peer.prepare(given), peer.order(given.logprobs))
            attempt()
        except Exception as error:  # another version of the library may ask for something else
            print(f"    {peer.name} fails: {type(error).__name__}: {error}")
        else:
            known[peer.name] = attempt
    return known


def measure(name: str, given: Inputs, kind: MaskKind, arguments: Any) -> dict[str, Any]:
    """Check, time and print one loss."""
    row, size = ROWS[name], "{}x{}".format(*given.mask.shape)
    columns, reason = works(row, given, arguments.compiled)
    check(name, row, given, columns)
    others = their_works(row, given, arguments.found_peers)
    rounds = arguments.rounds * (SMALL_REPEATS if size == SMALL else 1)
    times = interleave({**columns, **others}, rounds, "thread")
    held = kind == "contiguous" and bool(row.targets)  # targets are for contiguous masks
    limits = row.targets.get(size, {}) if held else {}
    found = figures(times, limits, SMALL_EXTRA_US if held and size == SMALL and not limits else None)
    if reason is not None:
        found["compiled"] = {"reason": reason, "target": limits.get("compiled")}
    result: dict[str, Any] = {"hand_ms": 1e3 * times.quantile(HAND, 5), **found}
    if others:
        result["peers"] = _their_figures(times, others, columns[HAND]()[0])
    _show(name, result)
    return result


def _their_figures(times: Times, others: Mapping[str, Work], hand_loss: Tensor) -> dict[str, dict[str, float]]:
    return {
        name: {
            "ms": 1e3 * times.quantile(name, 5),
            "ratio": times.ratio(name, HAND),
            "loss_ratio": float(way()[0] / hand_loss),
        }
        for name, way in others.items()
    }


def _show(name: str, result: Mapping[str, Any]) -> None:
    cells = "".join(f"{cell(result.get(column)):>30}" for column in COLUMNS)
    print(f"  {name:30}{result['hand_ms']:9.3f}{cells}", flush=True)
    if "reason" in result.get("compiled", {}):
        print(f"    does not compile: {result['compiled']['reason']}")
    for other, figure in result.get("peers", {}).items():
        print(
            f"    {other:60}{figure['ms']:9.3f} ms{figure['ratio']:8.2f}  loss / hand-written {figure['loss_ratio']:.6f}"
        )


def warm_allocator() -> None:
    """Free a large block, as any process has that ran a model.

    From then on glibc keeps blocks of that size instead of returning them to the system, whose page faults would take
    longer than the arithmetic.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8).fill_(1)


def run(arguments: Any) -> None:
    """Every loss, size and kind of mask."""
    warm_allocator()
    report = Report("losses")
    arguments.found_peers = peers.available() if arguments.peers else {}
    names = [n for n in ROWS if not arguments.only or any(word.lower() in n.lower() for word in arguments.only)]
    for size in arguments.sizes.split(","):
        sequences, width = (int(n) for n in size.split("x"))
        for kind in get_args(MaskKind):
            given = Inputs.draw(sequences, width, kind)
            share = float(given.mask.mean())
            print(f"\n{size}, {kind} masks, {share:.0%} trained; ratios to hand-written, of packed to the float mask")
            print(f"  {'':30}{'hand ms':>9}" + "".join(f"{column:>30}" for column in COLUMNS))
            rows = {name: measure(name, given, kind, arguments) for name in names}
            report.cases.append({"case": f"{size} {kind}", "baseline": HAND, "trained": share, "rows": rows})
    report.close()
