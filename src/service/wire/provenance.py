"""Where the tokens of a datum came from: runs of a prompt, and runs that were sampled."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self, final

import torch
from torch import Tensor

__all__ = ["Provenance", "Run"]


@final
@dataclass(frozen=True)
class Run:
    """Neighbouring tokens of one sequence.

    Attributes:
        sequence: id of the sequence, as sampling answered it.
        length: tokens.
        sampled: by a policy; else they were part of the prompt.
    """

    sequence: str
    length: int
    sampled: bool


@final
@dataclass(frozen=True)
class Provenance:
    """The runs that the tokens of one datum are made of.

    Attributes:
        inputs: of ``model_input``.
        targets: of ``target_tokens``.
    """

    inputs: tuple[Run, ...]
    targets: tuple[Run, ...]

    @classmethod
    def of(cls, inputs: Iterable[Any], targets: Iterable[Any]) -> Self | None:
        """Read a datum's protobuf spans; None if it has none."""
        provenance = cls(tuple(map(_run, inputs)), tuple(map(_run, targets)))
        return provenance if provenance.inputs or provenance.targets else None

    def sampled(self) -> Tensor:
        """Return which targets were sampled, bool [T]."""
        parts = [torch.full((run.length,), run.sampled) for run in self.targets]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.bool)

    def problems(self, inputs: int, targets: int) -> list[str]:
        """Say what is wrong with it for a datum of so many inputs and targets."""
        problems = []
        for name, runs, length in (("model_input", self.inputs, inputs), ("target_tokens", self.targets, targets)):
            if any(run.length < 0 or not run.sequence for run in runs):
                problems.append(f"the provenance of {name} has a run without a sequence, or of a negative length")
            elif sum(run.length for run in runs) != length:
                covered = sum(run.length for run in runs)
                problems.append(
                    f"the provenance of {name} covers {covered} tokens of {length}; its runs must cover each once"
                )
        return problems


def _run(span: Any) -> Run:
    sampled = span.WhichOneof("span") == "sampled_tokens"
    run = span.sampled_tokens if sampled else span.prompt_tokens
    return Run(run.sequence_id, run.length, sampled)
