"""The README's figure shows what is measured: a step in several calls has the gradient of one call; and rows that are timed."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

if not (Path(__file__).parent.parent / "benchmarks").is_dir():
    pytest.skip("the benchmarks are not part of the wheel", allow_module_level=True)

from benchmarks.rows import chats
from benchmarks.splits import LENGTHS, measure, texts
from benchmarks.splits_figure import SERIES, Split, draw
from pullback import TorchBackend
from pullback.testing import TinyLM

ROOT = Path(__file__).parent.parent
SVG = "{http://www.w3.org/2000/svg}"


def circles(figure: str) -> list[float]:
    """How high each point is drawn."""
    return [float(point.attrib["cy"]) for point in ElementTree.fromstring(figure).iter(f"{SVG}circle")]


def test_what_is_measured() -> None:
    """One division gives the gradient of one call; a mean of each call, added up or averaged, is far from it."""
    ids = torch.randint(17, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    splits = measure(TorchBackend(TinyLM(max_positions=128)), texts(ids), calls=(1, 4, 16))
    assert [split.calls for split in splits] == [1, 4, 16]
    assert max(split.deferred for split in splits) < 1e-12
    assert splits[0].added == splits[0].averaged < 1e-12, "one call has nothing to divide twice"
    assert all(split.added > 1 and split.averaged > 0.2 for split in splits[1:])


def test_texts() -> None:
    """Pieces of the text in order, of which all but the prompt is trained."""
    data = texts(list(range(1000)))
    trained = [int(datum.loss_fn_inputs["weights"].to_torch().sum()) for datum in data]
    assert tuple(trained) == LENGTHS
    assert data[1].model_input.to_ints()[0] == 8 + LENGTHS[0]


def test_a_point_for_each_number() -> None:
    """Higher is larger, on one scale for all series; an error of 0 lies at the bottom."""
    splits = [Split(2, 1e-9, 2.0, 0.5), Split(4, 0.0, 4.0, 0.5)]
    added, averaged, deferred = (circles(draw(splits, "a step"))[2 * i : 2 * i + 2] for i in range(len(SERIES)))
    assert added[1] < added[0] < averaged[0] < deferred[0] < deferred[1]
    assert averaged[0] == averaged[1]


def test_the_figure_of_the_readme() -> None:
    """It is there, whole, and says what `README.md` says: errors of one division that are a million times smaller."""
    figure = ROOT / "docs" / "splits.svg"
    assert figure.name in (ROOT / "README.md").read_text()
    heights = circles(figure.read_text())
    assert len(heights) == 4 * len(SERIES)
    assert min(heights[8:]) > max(heights[:8]) + 60


def test_rows_that_are_timed() -> None:
    """Users and assistants in turn, and no row twice, so that nothing can be remembered."""
    rows = chats(50, 16, 40)
    assert [message["role"] for message in rows[7]["messages"]] == ["user", "assistant"] * 8
    assert len({str(row) for row in rows}) == 50
    assert all(len(message["content"].split()) == 41 for row in rows for message in row["messages"])
