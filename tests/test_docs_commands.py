"""Every command that the pages print is one: its name, its options and their values are those of the parser."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.__main__ import command_parser as benchmarks_parser
from pullback.cli import command_parser

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    {*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")} - {ROOT / "CHANGELOG.md"}
)
BEFORE = r"(?:[A-Z_]+=\S+ |torchrun (?:-\S+ \S+ )*|python )*"  # settings, and what starts it
# In a sentence a command may be named without what it requires.
UNSAID = re.compile("the following arguments are required|expected one argument")


def printed(page: str) -> Iterator[tuple[str, bool]]:
    """Yield the lines of code blocks, and what stands between backticks in a sentence (True)."""
    blocks = re.findall(r"^```(?!py|text)\w*\n(.*?)^```", page, re.S | re.M)
    rest = re.sub(r"^```.*?^```", "", page, flags=re.S | re.M)
    for line in [*re.findall(r"^ {4}(\S.*)$", rest, re.M), *"\n".join(blocks).replace("\\\n", " ").splitlines()]:
        yield line, False
    for words in re.findall(r"`([^`]+)`", rest):
        yield " ".join(words.split()), True


def commands(page: str, name: str) -> list[tuple[list[str], bool]]:
    """Return the arguments of a command wherever a page prints it, and whether that is within a sentence."""
    found = [(re.match(rf"{BEFORE}(?:-m )?{name} ([a-z-].*)", line), inline) for line, inline in printed(page)]
    return [(shlex.split(match[1].partition(" &")[0], comments=True), inline) for match, inline in found if match]


def refusal(parser: argparse.ArgumentParser, words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return what the parser says against some arguments; nothing if it takes them, or prints its help."""
    try:
        parser.parse_args(words)
    except SystemExit as ended:
        return capsys.readouterr().err if ended.code else ""
    return ""


@pytest.mark.parametrize(("name", "parser"), [("pullback", command_parser), ("benchmarks", benchmarks_parser)])
def test_commands_are_those_of_the_parser(
    name: str, parser: Callable[[], argparse.ArgumentParser], capsys: pytest.CaptureFixture[str]
) -> None:
    """A renamed command, option or choice is found on every page, and so is a required argument in a block."""
    known, wrong, seen = parser(), [], 0
    for page in PAGES:
        for words, inline in commands(page.read_text(), name):
            seen += 1
            said = refusal(known, words, capsys)
            if said and not (inline and UNSAID.search(said)):
                wrong.append(f"{page.name}: {name} {' '.join(words)}: {said.splitlines()[-1]}")
    assert wrong == []
    assert seen > 10


@pytest.mark.parametrize(
    ("page", "words"),
    [
        ("    pullback serv --model tiny", "invalid choice"),
        ("Call `pullback check loss grpo --swift`.", "unrecognized arguments"),
        ("```sh\nPULLBACK_API_KEYS=a pullback serve --dtype half\n```", "invalid choice"),
        ("    torchrun --nproc-per-node 2 -m pullback plan   # what is missing", "required"),
    ],
)
def test_a_wrong_command_is_noticed(page: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The negative control: in a sentence, in a block, behind what starts it."""
    ((arguments, _),) = commands(page, "pullback")
    assert re.search(words, refusal(command_parser(), arguments, capsys))


def test_targets_are_those_of_the_makefile() -> None:
    """`make` is told to make what the Makefile makes."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {(page.name, words[0]) for page in PAGES for words, _ in commands(page.read_text(), "make")}
    assert {(page, target) for page, target in named if target not in targets} == set()
    assert len(named) > 10
