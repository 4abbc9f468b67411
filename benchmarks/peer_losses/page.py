"""The page that says what was found: `docs/peer-losses.md`, made of the JSON and of what was judged by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, Final

from .judged import ON_AVERAGE, REPAIRED, SETTINGS, Judgement, judgement

__all__ = ["page", "unjudged"]

_MARKS: Final = {"defect": "**D**", "edge": "E", "choice": "C"}
_INTRODUCTION: Final = """# The losses of other projects, checked

What `check_loss` finds on the loss functions of other projects, as they were released, on {date} with torch {torch}.
The functions are called as they are, in fp64 where they allow it, on {examples} random batches for each property;
`benchmarks/peer_losses` has one wrapper for each, which gives it its inputs in its own form.
[Check a loss](checking.md) says what the properties mean.

    python -m benchmarks.peer_losses --json benchmarks/peer_losses/found.json --page docs/peer-losses.md

A failure is judged by hand, from the source, and is one of three:

- **D**, a defect: on inputs that do occur it trains something other than its name or its documentation says, or fails;
- **E**, an edge: it fails on numbers that ordinary training does not have, e.g. NaN in masked positions or ratios beyond exp;
- **C**, a choice: it is meant, and documented or plain from the source. That a property fails says what the choice costs.

A check says nothing about the trainers around these functions, which may keep such numbers away from them. Who sees a
mistake of ours on this page is asked to tell us.
"""


def page(found: Mapping[str, Any]) -> str:
    """Return the page of what `report.run` found."""
    functions: Sequence[Mapping[str, Any]] = found["functions"]
    parts = [_INTRODUCTION.format(**found), _versions(found)]
    parts += ["## Defects\n\n" + _listed(functions, "defect"), _tables(functions)]
    parts += ["## Edges\n\n" + _listed(functions, "edge"), "## Choices\n\n" + _listed(functions, "choice")]
    parts += [_averages(functions), _settings(found["settings"]), _repaired()]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def unjudged(found: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return the failures that nobody has looked at."""
    failures = ((f["peer"], f["name"], name) for f in found["functions"] for name in f["failed"])
    return [failure for failure in failures if judgement(*failure) is None]


def _versions(found: Mapping[str, Any]) -> str:
    rows = [f"| {peer} | {version} | {_count(found, peer)} |" for peer, version in found["versions"].items()]
    return "\n".join(["| project | version | functions |", "| --- | --- | --- |", *rows])


def _count(found: Mapping[str, Any], peer: str) -> int:
    return sum(f["peer"] == peer for f in found["functions"])


def _judged(function: Mapping[str, Any]) -> list[tuple[str, Judgement]]:
    pairs = ((name, judgement(function["peer"], function["name"], name)) for name in function["failed"])
    return [(name, judged) for name, judged in pairs if judged is not None]


def _tables(functions: Sequence[Mapping[str, Any]]) -> str:
    """One table for each project: every function with its verdicts."""
    parts = ["## All functions\n", "`kind` is what a token's gradient is measured to depend on."]
    for peer, group in groupby(functions, key=lambda f: f["peer"]):
        parts += [
            f"\n### {peer}\n",
            "| function | kind | passed | not applicable | failed |",
            "| --- | --- | --- | --- | --- |",
        ]
        parts += [_row(function) for function in group]
    return "\n".join(parts)


def _row(function: Mapping[str, Any]) -> str:
    judged = _judged(function)
    failed = ", ".join(f"`{name}` {_MARKS[each.mark]}" for name, each in judged) or "none"
    if len(judged) > 9:  # it raises, whatever is asked
        failed = f"{len(judged)} properties {_MARKS[judged[0][1].mark]}"
    kind = function["kind"] or "not measured"
    return f"| {function['name']} | {kind} | {function['passed']} | {len(function['not_applicable'])} | {failed} |"


def _listed(functions: Sequence[Mapping[str, Any]], mark: str) -> str:
    """Every judgement of a kind once, with all functions that it is about."""
    about: dict[Judgement, dict[str, list[str]]] = {}
    for function in functions:
        for name, judged in _judged(function):
            if judged.mark == mark:
                names = about.setdefault(judged, {}).setdefault(f"{function['peer']} {function['name']}", [])
                names.append(f"`{name}`")
    lines = []
    for judged, named in about.items():
        properties = list(dict.fromkeys(name for names in named.values() for name in names))
        shown = ", ".join(properties) if len(properties) <= 9 else f"{len(properties)} properties"
        lines.append(f"- {_short(list(named))}: {shown}. {judged.sentence}")
    return "\n".join(lines)


def _short(named: Sequence[str]) -> str:
    """Name the functions, or their number where they are many."""
    if len(named) <= 4:
        return "; ".join(f"**{name}**" for name in named)
    peers = Counter(name.split(" ", 1)[0] for name in named)
    return "**" + ", ".join(f"{count} of {peer}'s" for peer, count in peers.items()) + "**"


def _averages(functions: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        "| {peer} {name} | {verdict} | {size:.3g} | {error:.3g} |".format(**f, **f["on_average"])
        for f in functions
        if "on_average" in f
    ]
    head = [
        "## What a KL trains on average\n",
        ON_AVERAGE,
        "",
        "| function | verdict | size | error |",
        "| --- | --- | --- | --- |",
    ]
    return "\n".join([*head, *rows])


def _settings(settings: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        f"| {s['peer']} {s['name']} | {s['setting']} | {'changes it' if s['effect'] else '**nothing changes**'} |"
        for s in settings
    ]
    head = ["## Settings\n", SETTINGS, "", "| function | setting | loss and gradient |", "| --- | --- | --- |"]
    return "\n".join([*head, *rows])


def _repaired() -> str:
    return "\n".join(["## Reported before, and repaired\n", *(f"- {line}" for line in REPAIRED)])
