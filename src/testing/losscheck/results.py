"""A property of a loss, and what became of it: one small frozen object each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal, final

from ..cases import Case
from .forms import LossUnderTest

__all__ = ["RUNS", "LossCheckError", "LossReport", "Property", "Result", "Verdict"]

Verdict = Literal["passed", "failed", "not applicable"]
Cases = Literal["any", "on_policy", "none"]
RUNS: Final = "runs"  # the one result of a loss that raises on every batch


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
        setup: what to import before that line.
    """

    property: str
    verdict: Verdict
    sentence: str = ""
    case: Case | None = None
    example: str = ""
    rerun: str = ""
    setup: str = ""

    def __str__(self) -> str:
        return self.told(self.setup)

    def told(self, setup: str = "") -> str:
        """Return it in words; the line that shows it again comes after these imports."""
        lines = [f"{self.property}: {self.verdict}" + (f": {self.sentence}" if self.sentence else "")]
        lines += [f"    {line}" for line in self.example.splitlines()]
        if self.rerun:
            lines += [f"    first: {setup}"] if setup else []
            lines += [f"    again: {self.rerun}"]
        return "\n".join(lines)


@final
@dataclass(frozen=True)
class LossReport:
    """The results of all properties of one loss.

    Attributes:
        loss: its name.
        form: how it was called.
        results: one per property.
        setup: what to import before a line that shows a failure again.
        note: what else to know of all of them.
    """

    loss: str
    form: str
    results: tuple[Result, ...]
    setup: str = ""
    note: str = ""

    @classmethod
    def of(cls, under_test: LossUnderTest, results: Iterable[Result]) -> LossReport:
        """Return the report on a loss."""
        done = tuple(results)  # before the note, which says what was seen
        return cls(under_test.name, under_test.form, done, under_test.rerun.setup, under_test.note)

    @property
    def title(self) -> str:
        """The loss, how it was called, and what else to know."""
        return f"{self.loss} ({self.form}{f'; {self.note}' if self.note else ''})"

    @property
    def imports(self) -> list[str]:
        """The line that says what to import before those that show a failure again; none where there are none."""
        again = self.setup and any(result.rerun for result in self.failed)
        return [f"before a line marked 'again': {self.setup}"] if again else []

    @property
    def failed(self) -> tuple[Result, ...]:
        """The results of the properties that do not hold."""
        return tuple(result for result in self.results if result.verdict == "failed")

    def __getitem__(self, name: str) -> Result:
        """Return the result of a property by its name; that it raises, where the loss raises on every batch."""
        for result in self.results:
            if result.property in (name, RUNS):
                return result
        raise KeyError(name)

    def __str__(self) -> str:
        """A table: one line for each property, and below it what failed."""
        lines = [f"{r.property:18} {r.verdict:15} {r.sentence}".rstrip() for r in self.results]
        for result in self.failed:
            lines += ["", result.told()]
        lines += ["", *self.imports, ""] if self.imports else []
        counts = Counter(result.verdict for result in self.results)
        total = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
        return "\n".join([self.title, *lines, total])

    def as_json(self) -> dict[str, Any]:
        """Return the report as what JSON can hold."""
        keys = ("property", "verdict", "sentence", "example", "rerun")
        rows = [{key: getattr(result, key) for key in keys} for result in self.results]
        named = {"loss": self.loss, "form": self.form, "note": self.note, "sound": not self.failed, "setup": self.setup}
        return {**named, "results": rows}


@final
class LossCheckError(AssertionError):
    """Some property of a loss does not hold; the message lists them.

    Attributes:
        report: all results.
    """

    def __init__(self, report: LossReport) -> None:
        found = [result.told() for result in report.failed]
        super().__init__("\n".join([f"{report.title}:", *found, *report.imports]))
        self.report = report
