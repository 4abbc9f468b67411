"""The help of every command: each option is explained, each default shown, each check on a line of its own."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator

import pytest

from pullback.cli import command_parser, main
from pullback.cli.arguments.parser import DTYPES, CommandParser, listing
from pullback.losses import loss_names
from pullback.testing import PROMISES
from pullback.testing.losscheck import LOSS_PROPERTIES


def commands(parser: argparse.ArgumentParser, name: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """A parser and, by their names, those of all its commands."""
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, inner in action.choices.items():
                yield from commands(inner, f"{name} {word}".strip())


ALL = dict(commands(command_parser()))


def problems(parser: argparse.ArgumentParser) -> list[str]:
    """What the help of a parser leaves unsaid."""
    found = []
    text = " ".join(parser.format_help().split())
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            continue
        if not action.help:
            found.append(f"{action.dest} has no help")
        shown = action.default not in (None, False, [], argparse.SUPPRESS)
        if action.option_strings and shown and f"(default: {action.default})" not in text:
            found.append(f"{action.dest} does not show its default")
        if "dtype" in action.dest and not all(dtype in text for dtype in action.choices or ["no choices"]):
            found.append(f"{action.dest} does not list its dtypes")
    return found


@pytest.mark.parametrize("name", ALL)
def test_every_option_is_explained(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its default, where it has one."""
    monkeypatch.setenv("COLUMNS", "1000")  # no word is cut at a hyphen
    assert problems(ALL[name]) == []


def test_what_is_unsaid_is_noticed() -> None:
    """The control: an option without help, one whose default is hidden, and a dtype that may be anything."""
    parser = CommandParser(prog="x", formatter_class=argparse.HelpFormatter)
    parser.add_argument("--a")
    parser.add_argument("--b", default=3, help="a number")
    parser.add_argument("--dtype", help="of something")
    assert problems(parser) == ["a has no help", "b does not show its default", "dtype does not list its dtypes"]


@pytest.mark.parametrize(
    ("command", "names"), [("check backend", PROMISES), ("check loss", LOSS_PROPERTIES)], ids=["backend", "loss"]
)
def test_a_line_for_each_check(command: str, names: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """After the options, so that these can be found."""
    monkeypatch.setenv("COLUMNS", "100")
    before, _, after = ALL[command].format_help().partition("\noptions:")
    assert len(before.splitlines()) < 20
    assert [name for name in names if not re.search(rf"^  {name}  ", after, re.M)] == []


def test_lists_keep_their_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each entry begins a line, however narrow the terminal."""
    monkeypatch.setenv("COLUMNS", "60")
    parser = CommandParser(prog="x", epilog=listing("entries", {"one": "words " * 40, "three": "more"}))
    text = parser.format_help()
    assert re.findall(r"^  (\w+)  ", text, re.M)[-2:] == ["one", "three"]
    assert max(map(len, text.splitlines())) <= 60


def test_unknown_dtypes_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is loaded, with those that there are."""
    with pytest.raises(SystemExit):
        main(["serve", "--dtype", "floaty"])
    printed = capsys.readouterr().err
    assert all(dtype in printed for dtype in DTYPES)


def test_losses_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    """Each by a line of words, with its inputs, and with where the keys belong."""
    assert main(["losses"]) == 0
    printed = capsys.readouterr().out
    assert "forward_backward(data, name, {...})" in printed
    assert [name for name in loss_names() if not re.search(rf"^{name}: \w.{{20,}}$", printed, re.M)] == []
    assert "inputs of each datum beside target_tokens: [weights], [group_id]" in printed
    assert "none" not in printed.partition("\ncross_entropy: ")[2].partition("\n\n")[0]
    assert main(["losses", "dpo", "kto"]) == 0
    chosen = capsys.readouterr().out
    assert re.findall(r"^(\w+): ", chosen, re.M) == ["dpo", "kto"]
    assert main(["losses", "dpoo"]) == 2
    refused = capsys.readouterr()
    assert "did you mean 'dpo'?" in refused.err
    assert refused.out == ""
