"""Tables for a page: the checks, the planted defects, and results of reports that were kept as JSON.

``python -m pullback.testing.conformance.page`` prints the first two, and with files that ``--json`` wrote the last.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from ..museum.backends import BACKENDS
from ..museum.exhibit import Exhibit
from . import THEMES

__all__ = ["checks_table", "defects_table", "precision_table", "results_table"]

_MARKS: Final = {"passed": "passed", "failed": "**failed**", "not supported": "not supported", "not applicable": "-"}


def checks_table() -> str:
    """Return every check with its promise and what usually breaks it."""
    rows = [["check", "promise", "usually broken by"]]
    for theme, checks in THEMES.items():
        rows.append([f"**{theme}**", "", ""])
        rows += [[f"`{check.name}`", check.promise, check.cause] for check in checks]
    return _table(rows)


def defects_table(exhibits: Sequence[Exhibit]) -> str:
    """Return every planted defect with where it was seen, what it did, and the check that finds it."""
    rows = [["defect", "seen in", "what it did", "found by"]]
    rows += [[e.name, e.source, e.harm, f"`{e.found_by}`"] for e in exhibits]
    return _table(rows)


def results_table(reports: Sequence[Mapping[str, Any]]) -> str:
    """Return the verdicts of several reports side by side, and how many checks passed.

    Args:
        reports: of `BackendReport.as_json`; a check that one of them lacks has an empty cell.
    """
    names = list(dict.fromkeys(row["check"] for report in reports for row in report["checks"]))
    found = [{row["check"]: row for row in report["checks"]} for report in reports]
    rows = [["check", *(report["backend"] for report in reports)]]
    rows += [[f"`{name}`", *(_verdict(each.get(name)) for each in found)] for name in names]
    rows.append(["seconds", *(f"{sum(row['seconds'] for row in report['checks']):.0f}" for report in reports)])
    rows.append(["**in all**", *(report["summary"] for report in reports)])
    return _table(rows)


def precision_table(report: Mapping[str, Any]) -> str:
    """Return what `precision_is_measured` found, a row for each dtype."""
    (row,) = [row for row in report["checks"] if row["check"] == "precision_is_measured"]
    found: dict[str, dict[str, Any]] = {}
    for name, value in row["evidence"].items():
        dtype, _, what = name.partition(": ")
        found.setdefault(dtype, {})[what] = value
    columns = list(dict.fromkeys(what for values in found.values() for what in values))
    rows = [["dtype", *columns]]
    rows += [[dtype, *(_number(values.get(what, "")) for what in columns)] for dtype, values in found.items()]
    return _table(rows)


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *others = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, f"|{' --- |' * len(rows[0])}", *others])


def _verdict(row: Mapping[str, Any] | None) -> str:
    return "" if row is None else _MARKS[row["verdict"]]


def _number(value: object) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def _print(files: Sequence[str]) -> None:
    reports = [json.loads(Path(file).read_text()) for file in files]
    if not reports:
        print(checks_table(), defects_table(BACKENDS), sep="\n\n")
        return
    print(results_table(reports), *map(precision_table, reports), sep="\n\n")


if __name__ == "__main__":
    _print(sys.argv[1:])
