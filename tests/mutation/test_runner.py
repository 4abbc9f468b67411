"""The runner: strong tests kill, weak ones let survive, endless loops are stopped, and the tree stays as it is."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if not (Path(__file__).parents[2] / "mutation").is_dir():
    pytest.skip("mutation testing is not part of the wheel", allow_module_level=True)

from mutation.equivalents import NAMED, read
from mutation.report import line, markdown, score
from mutation.report import read as read_results
from mutation.runner import Result
from mutation.sites import Mutant, mutants_of
from mutation.targets import TARGETS, modules, mutants

ROOT = Path(__file__).parents[2]
MODULE = """
def total(xs):
    result = 0.0
    for x in xs:
        result = result + x
    return result


def countdown(n):
    while n > 0:
        n = n - 1
    return n


class Never:
    def used(self, x):
        return -x
"""
STRONG = """
from toy import countdown, total

def test_total():
    assert total([2.0, 3.0]) == 5.0
    assert total([]) == 0.0

def test_countdown():
    assert countdown(3) == 0
    assert countdown(-1) == -1
"""
WEAK = """
from toy import countdown, total

def test_total():
    assert total([0.0]) <= 1.0

def test_countdown():
    assert countdown(0) == 0
"""
FREEZING = """
import gc

def pytest_collection_finish():
    gc.freeze()
"""
SCRIPT = """
import json, sys, tempfile
from pathlib import Path
import pytest
from mutation.runner import Runner
from mutation.sites import Mutant, mutants_of
found = mutants_of("toy.py", Path("toy.py").read_text())
with tempfile.TemporaryDirectory() as folder:
    results = []
    saved = Path(folder, "saved.json")
    runner = Runner(Path.cwd(), [Path("toy.py")], found, saved, 2, Path(folder), results.append, seconds=0.2)
    status = pytest.main(["-q", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", "test_toy.py"], plugins=[runner])
print(json.dumps({"status": status, "results": [[*r.mutant.key[1:4], r.status, r.test] for r in results]}))
"""


def tried(folder: Path, tests: str) -> tuple[int, dict[tuple[str, str, str], str]]:
    """Try the mutants of the toy module on these tests, and return pytest's status and how each ended."""
    (folder / "toy.py").write_text(MODULE)
    (folder / "test_toy.py").write_text(tests)
    (folder / "pytest.ini").write_text("[pytest]\npythonpath = .\n")
    light = {"PYTHONDONTWRITEBYTECODE": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **light}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    return last["status"], {tuple(key): status for *key, status, _ in last["results"]}


@functools.cache
def of_the_package() -> tuple[Mutant, ...]:
    return tuple(mutants(ROOT))


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_strong_tests_kill(tmp_path: Path) -> None:
    """Each mutant that a test runs is killed, endless loops by the time limit; what no test runs is not called killed."""
    (tmp_path / "conftest.py").write_text(FREEZING)  # as this suite's does
    status, found = tried(tmp_path, STRONG)
    assert status == 0
    endless = {("countdown", "n - 1", "n + 1"), ("countdown", "n - 1", "n"), ("countdown", "1", "0")}
    assert {key for key, ending in found.items() if ending == "time"} == endless
    assert {key for key, ending in found.items() if ending == "untested"} == {("Never.used", "-x", "x")}
    assert sum(ending == "killed" for ending in found.values()) == len(found) - 4 >= 7


def test_weak_tests_let_mutants_survive(tmp_path: Path) -> None:
    """Negative control: a suite that only runs the code kills next to nothing. And no file is written or changed."""
    _, found = tried(tmp_path, WEAK)
    assert {found["total", "result + x", after] for after in ("result - x", "result", "x")} == {"survived"}
    assert files(tmp_path) == {"toy.py": MODULE, "test_toy.py": WEAK, "pytest.ini": "[pytest]\npythonpath = .\n"}


def test_failing_tests_end_the_run(tmp_path: Path) -> None:
    """Tests that fail on the code as it is would kill everything: no mutant is tried."""
    status, found = tried(tmp_path, STRONG + "\ndef test_wrong():\n    assert total([1.0]) == 2.0\n")
    assert status != 0
    assert found == {}


def test_the_score_leaves_equivalents_out(tmp_path: Path) -> None:
    """Endings count as kills or not, equivalents not at all; the survivors are shown."""
    (tmp_path / "toy.py").write_text(MODULE)
    endings = ("killed", "time", "crash", "survived", "untested")
    found = mutants_of("toy.py", MODULE)
    results = [Result(mutant, ending) for mutant, ending in zip(found, endings, strict=False)]
    assert score(results) == 3 / 5
    assert score([]) == 1.0
    text = markdown(results, found[5:7], {"date": "today"}, tmp_path)
    assert "- mutants: 5, and 2 that are equivalent\n- killed: 3 (60.0 %)" in text
    assert [line for line in text.splitlines() if line.startswith("`toy.py:")] == [
        f"`toy.py:{m.lines[0]}`, `{m.function}`, {m.operator}; {why}"
        for m, why in zip(found[3:5], ("0 tests run it", "no test runs it"), strict=True)
    ]


def test_results_are_read_again(tmp_path: Path) -> None:
    """What was written line by line; the last word on a mutant holds, and what the code no longer has is left out."""
    found = mutants_of("toy.py", MODULE)
    results = [Result(mutant, "survived", "", 3) for mutant in found]
    gone = mutants_of("toy.py", "def gone(x):\n    return -x\n")[0]
    later = Result(found[0], "killed", "test_toy.py::test_total", 4)
    written = [*results, Result(gone, "killed"), later]
    (tmp_path / "results.jsonl").write_text("".join(line(result) + "\n" for result in written))
    assert read_results(tmp_path / "results.jsonl", found) == [later, *results[1:]]
    assert read_results(tmp_path / "nothing.jsonl", found) == []


def test_every_equivalent_is_a_mutant() -> None:
    """A named equivalent that the code no longer has is dropped from the list, and each says why no test can tell."""
    found = {(f"{m.path}:{m.function}", m.change) for m in of_the_package()}
    for known in NAMED:
        assert len(known.why.split()) >= 5, known
        assert known.changes, known
        assert {(known.function, change) for change in known.changes} <= found


def test_equivalents_cover_what_they_name(tmp_path: Path) -> None:
    """An entry covers its changes of its function, and no other."""
    entry = '[[equivalent]]\nfunction = "toy.py:total"\nchanges = ["0.0 -> 1.0"]\nwhy = "It is only an example."\n'
    (tmp_path / "some.toml").write_text(entry)
    (known,) = read(tmp_path / "some.toml")
    covered = [m for m in mutants_of("toy.py", MODULE) if known.covers(m)]
    assert [(m.function, m.before, m.after) for m in covered] == [("total", "0.0", "1.0")]
    twice = mutants_of("toy.py", "def total(x):\n    return f(0.0) + g(0.0)\n")
    assert [m.change for m in twice if m.operator == "swap_constants"] == ["0.0 -> 1.0", "0.0 -> 1.0 (2)"]
    assert [m.occurrence for m in twice if known.covers(m)] == [0]


def test_modules_are_chosen_by_target_or_path() -> None:
    """Nothing asked for is everything; a name is its target, another word a part of a path; every pattern has a module."""
    every = {path for path, _ in modules(ROOT)}
    by_name = [{path for path, _ in modules(ROOT, [name])} for name in TARGETS]
    assert set.union(*by_name) == every
    assert sum(map(len, by_name)) == len(every)
    assert {path.name for path, _ in modules(ROOT, ["functional/kl"])} == {"kl.py"}
    assert modules(ROOT, ["nothing"]) == []
    for target in TARGETS.values():
        assert all(list((ROOT / "src").glob(pattern)) for pattern in target.modules)
        assert all((ROOT / test).exists() for test in target.tests)


def test_gradient_paths_are_functions() -> None:
    """Each that the table names exists, so that a detach is added there."""
    found = {(m.path, m.function) for m in of_the_package() if m.operator == "add_detach"}
    named = {
        (f"src/{path}", name) for t in TARGETS.values() for path, names in t.gradient_paths.items() for name in names
    }
    assert found == named
