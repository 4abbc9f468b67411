"""What `docs/checking.md` prints of a failure is what it says it prints, and its table lists what is checked."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from pullback.testing import LossCheckError
from pullback.testing.losscheck import LOSS_PROPERTIES

PAGE = Path(__file__).parents[2] / "docs" / "checking.md"


@pytest.mark.skipif(not PAGE.exists(), reason="needs the source tree")
def test_the_page_prints_what_it_shows() -> None:
    """The failure that the page shows is the one that its code prints, and its two lines run as they are."""
    blocks = re.findall(r"```python\n(.*?)```\n\n((?:    [^\n]*\n)*)", PAGE.read_text(), re.S)
    code, after = next((code, after) for code, after in blocks if 'report["poison"]' in code)
    expected = "".join(line.removeprefix("    ") + "\n" for line in after.splitlines())
    output = io.StringIO()
    namespace: dict[str, Any] = {"torch": torch}
    with contextlib.redirect_stdout(output):
        exec(compile(code, str(PAGE), "exec"), namespace)
    assert output.getvalue() == expected
    first, again = (line.split(": ", 1)[1] for line in expected.splitlines()[-2:])
    with pytest.raises(LossCheckError, match="poison: failed"):
        exec(f"{first}\n{again}", {"multiplied": namespace["multiplied"]})


@pytest.mark.skipif(not PAGE.exists(), reason="needs the source tree")
def test_the_page_lists_every_property() -> None:
    """The table of the page has each property that is checked, and none that is not."""
    table = PAGE.read_text().partition("## The properties\n")[2].partition("\n\nWhat a function detaches")[0]
    cells = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    listed = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(listed) == sorted(LOSS_PROPERTIES)
