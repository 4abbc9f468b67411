"""``python -m benchmarks.sdk_versions``: see the package."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any, Final

from packaging.requirements import Requirement

from ..serving.services import own_service
from .one_round import STEPS

_RELEASES: Final = """
0.10.0 0.11.0 0.12.0 0.13.1 0.14.0 0.15.0 0.16.1 0.18.2 0.19.0 0.20.0 0.21.0 0.22.7 0.23.4 0.24.1 0.25.0
0.26.2 0.27.2 0.28.1 0.29.1 0.30.4 0.31.0 0.32.0 0.33.1 0.34.0 0.35.0 0.36.0 0.38.0
"""  # the last of each minor version
_SECONDS: Final = 300
_MODEL: Final = "tiny"


def main(argv: list[str] | None = None) -> int:
    """Try the chosen releases; return how many of them failed in a step."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sdk_versions", description=__doc__)
    parser.add_argument(
        "releases", nargs="*", default=_RELEASES.split(), help="of tinker; default: the last of each minor version"
    )
    parser.add_argument("--wheels", type=Path, help="a folder that has been filled by pip download --no-deps")
    arguments = parser.parse_args(argv)
    found = {}
    with own_service(_MODEL, _MODEL, 1024) as service:
        for release in arguments.releases:
            found[release] = _tried(release, service.url, arguments.wheels)
            _finish_sessions(service.url)
    print(_table(found))
    print(json.dumps({"benchmark": "sdk_versions", "releases": found}))
    return sum(any(step != "ok" for step in steps.values()) for steps in found.values())


def _tried(release: str, url: str, wheels: Path | None) -> dict[str, str]:
    """Install one release into a folder that goes afterwards, and run the round; return each step's outcome."""
    with tempfile.TemporaryDirectory() as folder:
        source = [] if wheels is None else ["--no-index", "--find-links", str(wheels)]
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--target",
            folder,
            *source,
            f"tinker=={release}",
        ]
        subprocess.run(command, check=True)
        lacking = _lacking(folder)
        paths = [folder, *filter(None, [os.environ.get("PYTHONPATH")])]
        given = {"PYTHONPATH": os.pathsep.join(paths), "TINKER_TELEMETRY": "0", "TINKER_API_KEY": "tml-none"}
        program = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("one_round.py")), url, _MODEL]
        try:
            done = subprocess.run(
                program, env={**os.environ, **given}, capture_output=True, text=True, timeout=_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            return {"all": f"no end within {_SECONDS} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"all": f"{done.stderr.strip()[-300:]}{lacking}"}
    steps: dict[str, str] = json.loads(lines[-1])
    print(release, {name: outcome for name, outcome in steps.items() if outcome != "ok"} or "ok", lacking, flush=True)
    return steps


def _finish_sessions(url: str) -> None:
    """Let go of the models of every session: older releases leave theirs to the server."""
    with urllib.request.urlopen(f"{url}/api/v1/sessions?limit=1000") as answer:
        sessions = json.load(answer)["sessions"]
    for session in sessions:
        urllib.request.urlopen(urllib.request.Request(f"{url}/api/v1/sessions/{session}/finish", method="POST")).close()


def _lacking(folder: str) -> str:
    """Say which of a release's requirements this environment does not meet."""
    (release,) = (found for found in distributions(path=[folder]) if found.name == "tinker")
    lacking = [need for need in release.requires or () if not _met(Requirement(need))]
    return f" (not met here: {', '.join(lacking)})" if lacking else ""


def _met(need: Requirement) -> bool:
    if need.marker is not None and not need.marker.evaluate({"extra": ""}):
        return True
    try:
        return need.specifier.contains(version(need.name), prereleases=True)
    except PackageNotFoundError:
        return False


def _table(found: dict[str, dict[str, str]]) -> str:
    rows = [["tinker", *STEPS], ["---"] * (len(STEPS) + 1)]
    rows += [[release, *(_cell(steps.get(step, "failed")) for step in STEPS)] for release, steps in found.items()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _cell(outcome: Any) -> str:
    return {"ok": "yes", "absent": "-"}.get(outcome, "no")


if __name__ == "__main__":
    sys.exit(main())
