"""Losses of other packages: `examples/loss_package` is found by its entry point, and what is wrong with one is said."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from pullback.errors import ConfigError, DuplicateLossError, UnknownLossError
from pullback.losses import DPO, Loss
from pullback.losses.registry import ENTRY_POINT_GROUP, Registry

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "loss_package"
pytestmark = pytest.mark.skipif(not EXAMPLE.is_dir(), reason="needs the source tree")


def metadata(folder: Path, points: dict[str, str], package: str = "pullback-cal-dpo") -> None:
    """Write what an installer leaves beside the modules of a package, which is where Python looks for entry points."""
    info = folder / f"{package.replace('-', '_')}-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.1.0\n")
    lines = [f"[{ENTRY_POINT_GROUP}]", *(f"{name} = {value}" for name, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package as it is when installed, on the path of this process."""
    project: dict[str, Any] = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    metadata(tmp_path, project["entry-points"][ENTRY_POINT_GROUP])
    shutil.copy(EXAMPLE / "pullback_cal_dpo.py", tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    return tmp_path


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the package in a folder beside pullback."""
    paths = [str(folder), str(ROOT / ".alias"), str(ROOT / "tests" / "support"), str(ROOT)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_found_by_its_name(installed: Path) -> None:
    """An unknown name looks for installed packages; its configuration is read and checked as that of any loss."""
    loss = Registry(ENTRY_POINT_GROUP).build("cal_dpo", {"beta": 0.2})
    assert type(loss).__module__ == "pullback_cal_dpo"
    assert loss == type(loss)(beta=0.2)
    assert Registry(ENTRY_POINT_GROUP).names() == ("cal_dpo",)
    with pytest.raises(ConfigError, match="did you mean 'calibration'"):
        Registry(ENTRY_POINT_GROUP).build("cal_dpo", {"calibratoin": 0.2})


def test_known_names_look_for_nothing(installed: Path) -> None:
    """A loss that is there is built whatever is installed; without its package a name is unknown."""
    (installed / "pullback_cal_dpo.py").write_text("raise RuntimeError('broken')")
    mine = Registry(ENTRY_POINT_GROUP)
    mine.register(DPO)
    assert mine.build("dpo") == DPO()
    with pytest.raises(UnknownLossError, match="unknown loss 'cal_dpo'"):
        Registry("pullback.nobody").get("cal_dpo")


def test_a_name_that_is_taken(installed: Path) -> None:
    """Two losses of one name are refused, with both places, and every time: a package is never left out in silence."""
    mine = Registry(ENTRY_POINT_GROUP)
    parts = {"aggregation": "sum", "gradient_kind": "batch", "required_inputs": (), "terms": lambda self, batch: ()}
    mine.register(type("Own", (Loss,), {"name": "cal_dpo", **parts}))
    for _ in range(2):
        with pytest.raises(DuplicateLossError, match=r"'cal_dpo' of pullback-cal-dpo \(pullback_cal_dpo:CalDPO\).*Own"):
            mine.names()


@pytest.mark.parametrize(
    ("name", "place", "words"),
    [
        ("lost", "pullback_nowhere:Loss", "cannot be loaded: ModuleNotFoundError"),
        ("lost", "pullback_cal_dpo:Missing", "cannot be loaded: AttributeError"),
        ("function", "pullback_cal_dpo:cal_dpo", "is no Loss class"),
        ("calibrated", "pullback_cal_dpo:CalDPO", "is a loss called 'cal_dpo'"),
    ],
)
def test_a_package_that_is_wrong(
    name: str, place: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an entry point leads to is a Loss of its name, or an error says which package to mend."""
    metadata(tmp_path, {name: place}, "pullback-broken")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path), str(EXAMPLE)])
    assert [point.name for point in entry_points(group=ENTRY_POINT_GROUP)] == [name]
    with pytest.raises(ConfigError, match=f"{name!r} of pullback-broken .*{words}"):
        Registry(ENTRY_POINT_GROUP).get("something")


@pytest.mark.slow
def test_checked_from_the_command_line(installed: Path) -> None:
    """`pullback check loss` and `pullback losses` know it by its name."""
    code = "from pullback.cli import main; main(['losses']); exit(main(['check', 'loss', 'cal_dpo', '--fast']))"
    done = run(installed, "-c", code)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\ncal_dpo: " in done.stdout
    assert "gradient kind: pair; source: arXiv:2412.14516" in done.stdout
    assert "cal_dpo (registered)" in done.stdout
    assert "failed" not in done.stdout


@pytest.mark.slow
def test_enrolled_in_our_own_checks(installed: Path) -> None:
    """Where it is installed, the tests of our registered losses run on it too, as they are."""
    done = run(
        installed,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/testing/test_losscheck.py",
        "-k",
        "sound and cal_dpo",
    )
    assert "1 passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_built_and_installed(tmp_path: Path) -> None:
    """Built and installed by pip it is found as well, and its own tests pass there."""
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(EXAMPLE, source)
    pip = [
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--target",
        str(target),
        str(source),
    ]
    built = run(tmp_path, "-m", "pip", *pip)
    assert built.returncode == 0, built.stdout + built.stderr
    done = run(target, "-c", "from pullback.losses import get_loss; print(get_loss('cal_dpo', {'beta': 0.3}))")
    assert "CalDPO(beta=0.3" in done.stdout, done.stdout + done.stderr
    own = [
        "-m",
        "pytest",
        "-q",
        "-p",
        "pullback_pytest",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
        "--pullback-profile",
        "fast",
    ]
    tests = run(target, *own, "--rootdir", str(source), str(source / "test_cal_dpo.py"))
    assert tests.returncode == 0, tests.stdout + tests.stderr
    assert "failed" not in tests.stdout
