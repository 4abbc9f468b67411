"""What is mutated, and which tests should notice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

from .sites import Mutant, mutants_of

__all__ = ["TARGETS", "Target", "modules", "mutants"]


@final
@dataclass(frozen=True)
class Target:
    """A part of the package.

    Attributes:
        modules: patterns of paths under src.
        tests: files and folders, of which those tests run that run a mutant's lines.
        gradient_paths: the functions through which autograd carries a gradient, by path: where a detach would cut it.
    """

    modules: tuple[str, ...]
    tests: tuple[str, ...]
    gradient_paths: dict[str, tuple[str, ...]]


_LOSSES: Final = ("tests/losses", "tests/testing/test_enumerate.py")
TARGETS: Final = {
    "functional": Target(
        ("losses/functional/*.py",),
        _LOSSES,
        {
            "losses/functional/kl.py": ("kl", "kl_penalty"),
            "losses/functional/likelihood.py": ("nll",),
            "losses/functional/numerics.py": ("bounded_exp", "bounded_expm1", "log1mexp"),
            "losses/functional/policy.py": (
                "policy_gradient",
                "importance_sampling",
                "ppo_clip",
                "clipped_ratio_loss",
                "gspo_token",
                "cispo",
                "dro",
            ),
            "losses/functional/preference.py": ("dpo", "kto", "log_odds", "log_odds_ratio", "odds_ratio", "simpo"),
        },
    ),
    "losses": Target(
        (
            "losses/aggregation.py",
            "losses/count*.py",
            "losses/policy/*.py",
            "losses/preference/*.py",
            "losses/supervised/*.py",
            "losses/parts/*.py",
            "losses/batch/selection.py",
            "losses/batch/sums.py",
            "losses/evaluation/token_sum.py",
            "losses/evaluation/pair_terms.py",
        ),
        _LOSSES,
        {
            "losses/batch/sums.py": ("row_sum", "weighted_sum", "scaled_sum", "row_cotangent", "times"),
            "losses/evaluation/token_sum.py": ("token_sum", "token_values", "_plain"),
            "losses/batch/selection.py": ("wide", "select"),
            "losses/parts/sequence_ratio.py": ("mean_log_ratio",),
            "losses/parts/kl.py": ("KL.penalty",),
            "losses/evaluation/pair_terms.py": ("Responses.sides",),
        },
    ),
    "backends": Target(
        (
            "backends/operations/normalization.py",
            "backends/calls/cotangents.py",
            "backends/operations/accumulation.py",
            "backends/calls/units.py",
            "backends/native/accumulator.py",
        ),
        (
            "tests/backends/test_accumulation.py",
            "tests/backends/test_cotangents.py",
            "tests/backends/test_counts_and_groups.py",
            "tests/backends/test_normalization.py",
            "tests/backends/test_prepared.py",
            "tests/backends/test_units.py",
            "tests/backends/native/test_accumulator.py",
            "tests/backends/native/test_cases_maths.py",
            "tests/backends/native/test_custom.py",
            "tests/backends/native/test_half_applied.py",
            "tests/backends/native/test_invariance.py",
            "tests/backends/native/test_step.py",
            "tests/backends/native/checkpoints/test_resume.py",
        ),
        {},
    ),
}


def modules(root: Path, only: Sequence[str] = ()) -> list[tuple[Path, Target]]:
    """Return the modules to mutate, with their targets.

    Args:
        root: of the tree.
        only: names of targets, or parts of paths under src; everything where there is none.
    """
    found = []
    for name, target in TARGETS.items():
        for path in sorted(path for pattern in target.modules for path in (root / "src").glob(pattern)):
            inside = path.relative_to(root / "src").as_posix()
            if not only or any(word == name or (word not in TARGETS and word in inside) for word in only):
                found.append((path, target))
    return found


def mutants(root: Path, only: Sequence[str] = ()) -> Iterator[Mutant]:
    """Yield the mutants of `modules`."""
    for path, target in modules(root, only):
        gradient_paths = target.gradient_paths.get(path.relative_to(root / "src").as_posix(), ())
        yield from mutants_of(path.relative_to(root).as_posix(), path.read_text(), gradient_paths)
