"""Everything that is printed as code runs as printed, and every path and link of the docs is there."""

from __future__ import annotations

import gc
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from tiers import sampled

from pullback.losses import registry

ROOT = Path(__file__).parent.parent
TUTORIAL = ROOT / "docs" / "tutorial.md"  # tests/test_tutorial.py runs it: it needs a model
PAGES = [ROOT / "README.md", *sorted({*(ROOT / "docs").glob("*.md")} - {TUTORIAL})]
CODE = re.compile(r"```python\n(.*?)```", re.S)
WITH_CODE = [page for page in PAGES if CODE.search(page.read_text())]
LONG_PAGES = ("backends.md", "checking.md", "conformance.md", "museum.md", "service.md")  # seconds each
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("*.md"))
ALL_PAGES = sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").rglob("*.md"))


# The SDK leaves its sockets to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize(
    "page", sampled(WITH_CODE, [page for page in WITH_CODE if page.name not in LONG_PAGES]), ids=lambda page: page.name
)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python blocks of a page run in order, in one namespace; the losses that it registers go with it."""
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    monkeypatch.chdir(tmp_path)  # for what a page saves
    namespace: dict[str, object] = {}
    for block in CODE.findall(page.read_text()):
        exec(compile(block, str(page), "exec"), namespace)
    namespace.clear()
    gc.collect()  # closes what the SDK left open, while its warnings are ignored


def missing_paths(text: str) -> list[str]:
    """The paths of the repository that a page names and that are not there."""
    named = re.findall(r"`((?:src|tests|docs|benchmarks|examples)(?:/[\w./-]+)?)`", text)
    return sorted({path for path in named if not (ROOT / path).exists()})


@pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="needs the source tree")
@pytest.mark.parametrize("page", [ROOT / "docs" / "glossary.md", *DECISIONS], ids=lambda page: page.name)
def test_paths_are_there(page: Path) -> None:
    """The glossary and the decisions name files that exist; a file that does not is noticed."""
    assert missing_paths(page.read_text()) == []
    assert missing_paths("in `src/nowhere.py`, and `src`") == ["src/nowhere.py"]


def missing_links(page: Path) -> list[str]:
    """The relative links of a page that lead nowhere."""
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text())
    return sorted({link for link in links if not (page.parent / link).exists()})


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path, tmp_path: Path) -> None:
    """Every relative link of a page leads to a file; one that does not is noticed."""
    assert missing_links(page) == []
    broken = tmp_path / "page.md"
    broken.write_text("[there](page.md) and [nowhere](nowhere.md), [elsewhere](https://example.org/x)")
    assert missing_links(broken) == ["nowhere.md"]


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda e: e.name)
def test_examples_run(example: Path) -> None:
    """Every example runs."""
    runpy.run_path(str(example))


@pytest.mark.parametrize(("backend", "only"), [("native", "sft,dpo,orpo,grpo"), ("remote", "sft")])
@pytest.mark.slow
def test_tiny_demo(backend: str, only: str, tmp_path: Path) -> None:
    """`pullback demo --model tiny` improves its objectives and leaves a picture and the figures; on a service too."""
    minutes = "0.5" if backend == "native" else "0.1"
    options = {"--model": "tiny", "--minutes": minutes, "--backend": backend, "--only": only, "--out": str(tmp_path)}
    command = [sys.executable, "-m", "pullback.cli", "demo", *(word for pair in options.items() for word in pair)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".alias")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"\byes\b", done.stdout)) == len(only.split(","))
    assert f"{backend} backend" in done.stdout.replace("\n", " ")
    assert (tmp_path / "curves.png").stat().st_size > 20_000
    assert '"improved": true' in (tmp_path / "results.json").read_text()
