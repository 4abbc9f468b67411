"""The report: scores by module and operator, and the survivors; and results line by line, for the next run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .runner import Result
from .sites import Mutant

__all__ = ["line", "markdown", "read", "score"]


def score(results: Iterable[Result]) -> float:
    """Return the share of the mutants that are killed; 1 where there is none."""
    killed = [result.killed for result in results]
    return sum(killed) / len(killed) if killed else 1.0


def markdown(results: Sequence[Result], equivalents: Sequence[Mutant], facts: Mapping[str, Any], root: Path) -> str:
    """Return the report for people.

    Args:
        results: of the mutants that were tried.
        equivalents: the mutants that no test can tell from the code; they are left out of the score.
        facts: what else to say, one line each.
        root: of the modules' paths.
    """
    head = [f"- {name}: {value}" for name, value in facts.items()]
    head.append(f"- mutants: {len(results)}, and {len(equivalents)} that are equivalent")
    head.append(f"- killed: {sum(r.killed for r in results)} ({100 * score(results):.1f} %)")
    parts = ["\n".join(head)]
    parts.append(_table("module", results, equivalents, lambda mutant: mutant.path))
    parts.append(_table("operator", results, equivalents, lambda mutant: mutant.operator))
    left = [result for result in results if not result.killed]
    parts.append(f"{len(left)} survivors" + (":" if left else "."))
    parts += [_survivor(result, root) for result in left]
    return "\n\n".join(parts) + "\n"


def _table(title: str, results: Sequence[Result], equivalents: Sequence[Mutant], by: Callable[[Mutant], str]) -> str:
    lines = [f"| {title} | mutants | killed | by time or crash | survived | equivalent | score |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for name in sorted({by(result.mutant) for result in results} | {by(mutant) for mutant in equivalents}):
        own = [result for result in results if by(result.mutant) == name]
        hard = sum(result.status in ("time", "crash") for result in own)
        killed, same = sum(result.killed for result in own), sum(by(mutant) == name for mutant in equivalents)
        lines.append(
            f"| `{name}` | {len(own)} | {killed} | {hard} | {len(own) - killed} | {same} | {100 * score(own):.1f} % |"
        )
    return "\n".join(lines)


def _survivor(result: Result, root: Path) -> str:
    mutant = result.mutant
    source = (root / mutant.path).read_text()
    line = source.encode()[: mutant.start].count(b"\n") + 1
    why = "no test runs it" if result.status == "untested" else f"{result.tests} tests run it"
    title = f"`{mutant.path}:{line}`, `{mutant.function}`, {mutant.operator}; {why}"
    return f"{title}\n\n```diff\n{mutant.diff(source)}\n```"


def line(result: Result) -> str:
    """Return a result as one line of JSON, for `read`."""
    return json.dumps({"key": result.mutant.key, "status": result.status, "test": result.test, "tests": result.tests})


def read(path: Path, mutants: Sequence[Mutant]) -> list[Result]:
    """Return what earlier runs found of these mutants, the last word on each; nothing where there is no file."""
    known = {mutant.key: mutant for mutant in mutants}
    found: dict[Mutant, Result] = {}
    for text in path.read_text().splitlines() if path.exists() else ():
        saved = json.loads(text)
        mutant = known.get(tuple(saved.pop("key")))
        if mutant is not None:
            found[mutant] = Result(mutant, **saved)
    return list(found.values())
