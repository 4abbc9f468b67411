"""The report of a backend: for a terminal, for a tracker, and for a program."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, final, get_args

from .check import Check, CheckResult, Verdict

__all__ = ["BackendReport"]


@final
@dataclass(frozen=True)
class BackendReport:
    """The results of all checks of one backend.

    Attributes:
        backend: its name.
        facts: what it is: versions, address, options.
        checks: that were run.
        results: one per check.
    """

    backend: str
    facts: Mapping[str, str]
    checks: tuple[Check, ...]
    results: tuple[CheckResult, ...]

    @property
    def failed(self) -> tuple[CheckResult, ...]:
        """The results of broken promises."""
        return tuple(result for result in self.results if result.verdict == "failed")

    def __getitem__(self, name: str) -> CheckResult:
        """Return the result of a check by its name."""
        for result in self.results:
            if result.check == name:
                return result
        raise KeyError(name)

    @property
    def summary(self) -> str:
        """How many checks ended how."""
        counts = Counter(result.verdict for result in self.results)
        return ", ".join(f"{counts[verdict]} {verdict}" for verdict in get_args(Verdict) if counts[verdict])

    def __str__(self) -> str:
        return "\n".join([f"{self.backend}", *map(line_of, self.results), self.summary])

    def as_json(self) -> dict[str, Any]:
        """Return the report as what JSON can hold."""
        promises = {check.name: check.promise for check in self.checks}
        rows = [{**asdict(result), "promise": promises[result.check]} for result in self.results]
        return {
            "backend": self.backend,
            "facts": dict(self.facts),
            "conforms": not self.failed,
            "summary": self.summary,
            "checks": rows,
        }

    def as_markdown(self) -> str:
        """Return the report as a maintainer would put it into a tracker."""
        today = datetime.now(UTC).date().isoformat()
        lines = [f"# Conformance of {self.backend}", "", f"{today}: {self.summary}.", ""]
        lines += [f"- {name}: {value}" for name, value in self.facts.items()]
        lines += ["", "| check | verdict | measured |", "| --- | --- | --- |"]
        lines += [f"| `{r.check}` | {r.verdict} | {_cell(_measured(r))} |" for r in self.results]
        for result in self.failed:
            lines += ["", *self._failure(result)]
        lines += self._others()
        return "\n".join(lines) + "\n"

    def _failure(self, result: CheckResult) -> list[str]:
        promise = next(check.promise for check in self.checks if check.name == result.check)
        return [
            f"## `{result.check}` failed",
            "",
            f"- **promised:** {promise}",
            f"- **found:** {result.sentence}",
            f"- **likely cause:** {result.cause}",
            f"- **measured:** {_measured(result) or 'nothing'}",
            f"- **again:** `{self.facts.get('command', 'check_backend')} --only {result.check}`",
        ]

    def _others(self) -> list[str]:
        without = [r for r in self.results if r.verdict in ("not supported", "not applicable")]
        if not without:
            return []
        return ["", "## Without a verdict", "", *(f"- `{r.check}`: {r.verdict}: {r.sentence}" for r in without)]


def line_of(result: CheckResult) -> str:
    """Return a result as one line, or two where it failed."""
    line = f"{result.check:40} {result.verdict:14} {result.sentence or _measured(result)}".rstrip()
    return f"{line}\n{'':40} {'':14} likely cause: {result.cause}" if result.verdict == "failed" else line


def _measured(result: CheckResult) -> str:
    return "; ".join(f"{name} {_number(value)}" for name, value in result.evidence.items())


def _number(value: float | int | str) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
