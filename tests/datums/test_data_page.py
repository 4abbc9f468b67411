"""What `docs/data.md` prints is what it says it prints."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def test_the_page_prints_what_it_shows() -> None:
    """Each indented block of the page is the output of the code before it."""
    namespace: dict[str, object] = {}
    shown = 0
    for code, after in re.findall(r"```python\n(.*?)```\n\n((?:    [^\n]*\n)*)", PAGE.read_text(), re.S):
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(code, str(PAGE), "exec"), namespace)
        expected = "".join(line.removeprefix("    ") + "\n" for line in after.splitlines())
        assert output.getvalue() == expected
        shown += bool(expected)
    assert shown == 3
