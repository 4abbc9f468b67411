"""A property of a loss, and what became of it: one small frozen object each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, final

from ..cases import Case
from .forms import LossUnderTest

__all__ = ["LossCheckError", "LossReport", "Property", "Result", "Verdict"]

Verdict = Literal["passed", "failed", "not applicable"]
Cases = Literal["any", "on_policy", "none"]


@final
@dataclass(frozen=True)
class Property:
    """Something that every sound loss has.

    Attributes:
        name: what it is asked for by.
        proves: one sentence.
        causes: what usually breaks it.
        check: looks at a loss under test on one case; raises `Failed` or `NotApplicable`, or returns a note.
        cases: of which kind: ``any`` numbers; ``on_policy``, where the policy is its own anchor and sampler; ``none``, where
            the check has numbers of its own.
    """

    name: str
    proves: str
    causes: tuple[str, ...]
    check: Callable[[LossUnderTest, Case], str | None]
    cases: Cases = "any"


@final
@dataclass(frozen=True)
class Result:
    """What became of one property.

    Attributes:
        property: its name.
        verdict: ``passed``, ``failed`` or ``not applicable``.
        sentence: what was found, with the likely cause; of a passed property a note, or nothing.
        case: the smallest batch that shows it.
        example: that batch in tokens and numbers.
        rerun: a line that shows it again.
    """

    property: str
    verdict: Verdict
    sentence: str = ""
    case: Case | None = None
    example: str = ""
    rerun: str = ""

    def __str__(self) -> str:
        lines = [f"{self.property}: {self.verdict}" + (f": {self.sentence}" if self.sentence else "")]
        lines += [f"    {line}" for line in self.example.splitlines()]
        return "\n".join(lines + ([f"    again: {self.rerun}"] if self.rerun else []))


@final
@dataclass(frozen=True)
class LossReport:
    """The results of all properties of one loss.

    Attributes:
        loss: its name.
        form: how it was called.
        results: one per property.
        setup: what to import before a line that shows a failure again.
    """

    loss: str
    form: str
    results: tuple[Result, ...]
    setup: str = ""

    @property
    def failed(self) -> tuple[Result, ...]:
        """The results of the properties that do not hold."""
        return tuple(result for result in self.results if result.verdict == "failed")

    def __getitem__(self, name: str) -> Result:
        """Return the result of a property by its name."""
        for result in self.results:
            if result.property == name:
                return result
        raise KeyError(name)

    def __str__(self) -> str:
        """A table: one line for each property, and below it what failed."""
        lines = [f"{r.property:18} {r.verdict:15} {r.sentence}".rstrip() for r in self.results]
        for result in self.failed:
            lines += ["", str(result)]
        if self.failed and self.setup:
            lines += ["", f"before a line marked 'again': {self.setup}", ""]
        counts = Counter(result.verdict for result in self.results)
        total = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
        return "\n".join([f"{self.loss} ({self.form})", *lines, total])

    def as_json(self) -> dict[str, Any]:
        """Return the report as what JSON can hold."""
        keys = ("property", "verdict", "sentence", "example", "rerun")
        rows = [{key: getattr(result, key) for key in keys} for result in self.results]
        named = {"loss": self.loss, "form": self.form, "sound": not self.failed, "setup": self.setup}
        return {**named, "results": rows}


@final
class LossCheckError(AssertionError):
    """Some property of a loss does not hold; the message lists them.

    Attributes:
        report: all results.
    """

    def __init__(self, report: LossReport) -> None:
        found = [str(result) for result in report.failed]
        setup = [f"before a line marked 'again': {report.setup}"] if report.setup else []
        super().__init__("\n".join([f"{report.loss} ({report.form}):", *found, *setup]))
        self.report = report
