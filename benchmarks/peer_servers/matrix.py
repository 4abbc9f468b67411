"""The reports of several servers as one table: a row for each check, a column for each server."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

__all__ = ["matrix", "read_reports"]

_SIGNS: Final = {"passed": "yes", "failed": "**no**", "not supported": "-", "not applicable": "-"}


def read_reports(folder: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the JSON reports that are there, by the server's name."""
    files = {name: folder / f"{name}.json" for name in names}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}


def matrix(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table in Markdown: ``yes`` passed, ``no`` failed, ``-`` no verdict, empty: not run."""
    verdicts = {name: {row["check"]: row["verdict"] for row in report["checks"]} for name, report in reports.items()}
    checks = list(dict.fromkeys(row["check"] for report in reports.values() for row in report["checks"]))
    promises = {row["check"]: row["promise"] for report in reports.values() for row in report["checks"]}
    lines = [f"| check | {' | '.join(reports)} |", f"| --- |{' --- |' * len(reports)}"]
    for check in checks:
        cells = [_SIGNS.get(verdicts[name].get(check, ""), "") for name in reports]
        lines.append(f"| `{check}`: {_first_sentence(promises[check])} | {' | '.join(cells)} |")
    counts = [f"{sum(v == 'passed' for v in found.values())} of {len(found)}" for found in verdicts.values()]
    return "\n".join([*lines, f"| passed | {' | '.join(counts)} |"])


def _first_sentence(promise: str) -> str:
    return promise.split(". ")[0].split("; ")[0].rstrip(".").replace("|", "\\|").replace("\n", " ")
