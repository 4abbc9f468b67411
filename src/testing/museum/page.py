"""The museum as a page: ``python -m pullback.testing.museum.page > docs/museum.md``."""

from __future__ import annotations

import difflib
import inspect
import re
import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

from ..conformance import PROMISES
from ..datacheck import BUILDER_ROWS
from ..losscheck.properties import LOSS_PROPERTIES
from .exhibit import Exhibit, Kind

__all__ = ["museum_page"]

_TITLES: Final[dict[Kind, str]] = {"loss": "Losses", "data": "Data", "model": "Models", "backend": "Backends"}
_CHECKS: Final[dict[Kind, str]] = {
    "loss": "check_loss",
    "data": "check_builder",
    "model": "check_model",
    "backend": "check_backend",
}
_NAMES: Final[dict[Kind, str]] = {"loss": "loss", "data": "build", "model": "load", "backend": "make"}
_HEAD: Final = """\
# The bug museum

Defects that this field has had: most of them ran, logged a plausible loss, and trained something else. Each is here in a few
lines, with the thread where it was seen, what it did, the check that finds it, and its repair. The tests hold every exhibit to
its check, and every repaired one is passed; this page is made from the same code (`python -m pullback.testing.museum.page`).

{count} exhibits: {kinds}.

```python
from pullback.testing.museum import EXHIBITS, examine

(exhibit,) = [exhibit for exhibit in EXHIBITS if exhibit.name == "mask multiplies"]
print(examine(exhibit).sentence)
print(examine(exhibit, exhibit.repaired).found)
```

Lines that begin with `-` are the defect, with `+` its repair. `clean(x, mask)` is `x` where the mask is set, else 0;
`masked_mean` the mean over the mask. A backend is shown by what it does otherwise than the one that it hands its verbs on to.
"""


def museum_page(exhibits: Sequence[Exhibit]) -> str:
    """Return the exhibits as Markdown, by kind."""
    counts = Counter(exhibit.kind for exhibit in exhibits)
    kinds = ", ".join(f"{counts[kind]} {title.lower()}" for kind, title in _TITLES.items() if counts[kind])
    parts = [_HEAD.format(count=len(exhibits), kinds=kinds)]
    for kind, title in _TITLES.items():
        if counts[kind]:
            parts.append(f"## {title}\n")
            parts += [_section(exhibit) for exhibit in exhibits if exhibit.kind == kind]
    return "\n".join(parts)


def _section(exhibit: Exhibit) -> str:
    title = exhibit.name if exhibit.name.startswith("k1") else exhibit.name[0].upper() + exhibit.name[1:]
    proves = _proves(exhibit)
    found = f"Found by `{_CHECKS[exhibit.kind]}`, `{exhibit.found_by}`" + (f": {proves}" if proves else ".")
    lines = [f"### {title}\n", f"{_linked(exhibit.source)}. {exhibit.harm}\n"]
    return "\n".join([*lines, f"{_shown(exhibit)}\n", f"{found}\n"])


def _proves(exhibit: Exhibit) -> str:
    """Return the first sentence of what the property, row or promise says of a sound piece."""
    match exhibit.kind:
        case "loss":
            return LOSS_PROPERTIES[exhibit.found_by].proves
        case "data":
            return inspect.getdoc(BUILDER_ROWS[exhibit.found_by]) or ""
        case "backend":
            return PROMISES[exhibit.found_by].promise
    return ""


def _shown(exhibit: Exhibit) -> str:
    """Return the defect and its repair; of a backend what it does otherwise than one that is right."""
    if exhibit.kind == "backend":
        lines = _source(exhibit.broken, exhibit.broken.__name__)
        first = next(i for i, line in enumerate(lines) if line.startswith("class "))
        return "\n".join(["```py", *lines[first:], "```"])  # not `python`: these lines alone do not run
    return f"```diff\n{_difference(exhibit)}\n```"


def _difference(exhibit: Exhibit) -> str:
    name = _NAMES[exhibit.kind]
    broken, repaired = (_source(piece, name) for piece in exhibit.shown or (exhibit.broken, exhibit.repaired))
    lines = difflib.unified_diff(broken, repaired, n=len(broken) + len(repaired), lineterm="")
    return "\n".join(list(lines)[3:])


def _source(piece: Any, name: str) -> list[str]:
    """Return the lines of a function or class under a common name, without annotations and other directives."""
    text = textwrap.dedent(inspect.getsource(piece)).rstrip()
    text = re.sub(r"\(\n\s+([^()]*)\n\s*\)( -> [^\n]+)?:", r"(\1):", text)
    text = re.sub(r"(?m)^(\s*def [^\n]*?\)) -> [^\n]+:$", r"\1:", text)
    text = re.sub(r"(?<=[\w)]): (?:Tensor|Any|int|Config|NormalizationMode|Mode) = ", "=", text)
    text = re.sub(r"(?<=[\w)]): (?:Tensor|Any|int|Config|NormalizationMode|Mode)\b", "", text)
    text = re.sub(r"\s+# (?:noqa|type:)[^\n]*", "", text)
    text = re.sub(rf"\b{re.escape(piece.__name__)}\b", name, text)
    return re.sub(r"(?<![\w.])_(?=[A-Za-z])", "", text).splitlines()


def _linked(source: str) -> str:
    source = re.sub(r"([\w.-]+/[\w.-]+)#(\d+)", r"[\1#\2](https://github.com/\1/issues/\2)", source)
    source = re.sub(r"arXiv:([\d.]+\d)", r"[arXiv:\1](https://arxiv.org/abs/\1)", source)
    return source[0].upper() + source[1:] if " " in source.split("[")[0] else source


if __name__ == "__main__":
    from . import EXHIBITS

    print(museum_page(EXHIBITS), end="")
