"""The command that checks other projects' servers: its table, its list, and how it ends what it has started."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("benchmarks.peer_servers.run", reason="the benchmarks are not part of the wheel")

from benchmarks.peer_servers import run
from benchmarks.peer_servers.__main__ import main
from benchmarks.peer_servers.matrix import matrix, read_reports
from benchmarks.peer_servers.peers import PEERS
from pullback.backends import FakeBackend
from pullback.testing import PROMISES, BackendUnderTest, backend_report

_SERVER = """
import http.server, os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(sys.argv[3] + "/pids", "w").write(f"{os.getpid()} {child.pid}")
http.server.HTTPServer(("127.0.0.1", int(sys.argv[2])), http.server.BaseHTTPRequestHandler).serve_forever()
"""


def test_the_matrix_has_every_check(tmp_path: Path) -> None:
    """A row for each check that any server was asked, and its verdict for each."""
    chosen = [PROMISES["scores_are_aligned"], PROMISES["every_token_counts"]]
    reports: dict[str, Any] = {}
    for name, checks in (("skyrl", chosen), ("tuft", chosen[:1])):
        report = backend_report(BackendUnderTest(FakeBackend), checks).as_json()
        (tmp_path / f"{name}.json").write_text(json.dumps(report))
    reports = read_reports(tmp_path, ["skyrl", "hatchery", "tuft"])
    reports["tuft"]["checks"][0]["verdict"] = "failed"
    rows = matrix(reports).splitlines()
    assert rows[0] == "| check | skyrl | tuft |"
    assert [row.split("|")[2:4] for row in rows[2:]] == [
        [" yes ", " **no** "],
        [" yes ", "  "],
        [" 2 of 2 ", " 0 of 1 "],
    ]


def test_the_list_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    """Every server has its launcher and exact versions; a name that is none is refused."""
    for peer in PEERS.values():
        assert (Path(run.__file__).parent / "launch" / peer.launcher).is_file()
        assert any(peer.name in packages for packages in peer.installs)
        assert "==" in peer.name
    with pytest.raises(SystemExit):
        main(["tinkerbell"])
    assert "there is no tinkerbell, only skyrl, hatchery, tuft" in capsys.readouterr().err


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Any:
    """A server of this Python, in place of a peer's."""
    peer = replace(PEERS["tuft"], launcher="planted_server.py")
    (tmp_path / "planted_server.py").write_text(script)
    (tmp_path / "planted_server" / "bin").mkdir(parents=True)
    (tmp_path / "planted_server" / "bin" / "python").symlink_to(sys.executable)
    monkeypatch.setattr(run, "_LAUNCH", tmp_path)
    return peer


def test_a_server_ends_with_all_that_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its children end with it, after an error too."""
    peer, pids = planted(tmp_path, monkeypatch, _SERVER), list[int]()

    def work() -> None:
        with run.serving(peer, tmp_path, tmp_path) as url:
            pids.extend(map(int, (tmp_path / "planted_server" / "state" / "pids").read_text().split()))
            assert url.startswith("http://127.0.0.1:")
            assert len(pids) == 2
            assert all(alive(pid) for pid in pids)
            raise ValueError("planted")

    with pytest.raises(ValueError, match="planted"):
        work()
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)


def test_a_server_that_ends_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error has the last lines of its log."""
    peer = planted(tmp_path, monkeypatch, "raise SystemExit('no GPU here')")
    with pytest.raises(RuntimeError, match=r"status 1:\nno GPU here"), run.serving(peer, tmp_path, tmp_path):
        pass
