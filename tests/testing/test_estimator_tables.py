"""The tables of biases: the page is what the code says, and its verdicts are no accident of one seed."""

from __future__ import annotations

from pathlib import Path

import pytest

from pullback.testing.estimator_tables import estimator_page, estimator_tables

PAGE = Path(__file__).parents[2] / "docs" / "estimators.md"


def verdicts(seed: int) -> dict[tuple[str, str, str], str]:
    return {(t.title, r.estimator, r.target): r.verdict for t in estimator_tables(seed) for r in t.rows}


@pytest.mark.skipif(not PAGE.exists(), reason="needs the source tree")
def test_page() -> None:
    """The page is the one that is made; other numbers would make another."""
    page = estimator_page()
    assert PAGE.read_text() == page, "write it anew: python -m pullback.testing.estimator_tables > docs/estimators.md"


def test_what_theory_says() -> None:
    """Unbiased, scaled and silent estimators are those that the literature has as such."""
    found = verdicts(3)
    exact = {name for (_, name, target), verdict in found.items() if verdict == "exact" and target != "forward_kl"}
    assert exact == {
        *("k2, pathwise", "any of them, reverse", "k2, pathwise, times the ratio", "k3, reverse, times the ratio"),
        *("the reward itself", "less the mean of the others (RLOO)"),
        *("token, whole", "sequence, whole", "geometric mean, whole"),
        *(f"temperature {t}, ratio to those of the sampler" for t in (0.7, 1.3)),
    }
    assert [name for (_, name, target), v in found.items() if v == "exact" and target == "forward_kl"] == [
        "k3, pathwise"
    ]
    assert {name for (_, name, _), v in found.items() if v == "scaled"} == {"less the mean (Dr. GRPO)"}
    assert {name for (_, name, _), v in found.items() if v == "zero"} == {"k1, pathwise"}
    whole = {name for (title, name, _), v in found.items() if title.endswith("3 tokens") and v == "exact"}
    assert whole == {"sequence, whole"}


@pytest.mark.slow
def test_verdicts_of_other_seeds() -> None:
    """What is exact, scaled or zero is so for every seed; what is biased is hardly ever exact, where no bound is reached."""
    first, others = verdicts(0), [verdicts(seed) for seed in range(1, 7)]
    for row, verdict in first.items():
        again = [other[row] for other in others]
        if verdict == "biased":
            assert again.count("exact") <= 2, row
        else:
            assert set(again) == {verdict}, row
