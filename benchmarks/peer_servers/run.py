"""Installing a peer, starting it, checking it, ending it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from .peers import Peer

__all__ = ["check", "install", "isolated_command", "serving"]

_LAUNCH: Final = Path(__file__).parent / "launch"
_START: Final = 240.0  # seconds that a server may take
_STOP: Final = 30.0
_RANK: Final = "4"
_LOSSES: Final = ("cross_entropy", "importance_sampling", "ppo", "dpo")


def install(peer: Peer, folder: Path) -> None:
    """Make the peer's environment, and lay the SDK beside it; what is there already stays.

    Raises:
        RuntimeError: its Python is not here, or pip fails; says what pip said last.
    """
    home, done = folder / peer.launcher.removesuffix(".py"), folder / peer.launcher.removesuffix(".py") / "installed"
    if done.exists():
        return
    python = shutil.which(peer.python)
    if python is None:
        raise RuntimeError(f"{peer.name} needs {peer.python}, which is not on the path")
    _run([python, "-m", "venv", str(home)], f"an environment for {peer.name}")
    for packages in peer.installs:
        _run([str(home / "bin" / "pip"), "install", "-q", *packages], f"{peer.name}: pip install {' '.join(packages)}")
    if not sdk_folder(peer, folder).is_dir():
        target = ["--no-deps", "--target", str(sdk_folder(peer, folder)), f"tinker=={peer.sdk}"]
        _run([sys.executable, "-m", "pip", "install", "-q", *target], f"tinker {peer.sdk}")
    done.touch()


def sdk_folder(peer: Peer, folder: Path) -> Path:
    """Return where the SDK lies that speaks to the peer."""
    return folder / f"tinker-{peer.sdk}"


@contextlib.contextmanager
def serving(peer: Peer, folder: Path, model: Path) -> Iterator[str]:
    """Start the server on this machine, give its address, and end it.

    Raises:
        RuntimeError: it ends, or does not answer in time; says what it wrote last.
    """
    home, port = folder / peer.launcher.removesuffix(".py"), _free_port()
    state, log = home / "state", home / "server.log"
    shutil.rmtree(state, ignore_errors=True)
    state.mkdir()
    command = [str(home / "bin" / "python"), str(_LAUNCH / peer.launcher), str(model), str(port), str(state)]
    environment = {**os.environ, **peer.environment, "HOME": str(state)}
    environment.pop("PYTHONPATH", None)
    with log.open("w") as written:
        server = subprocess.Popen(command, stdout=written, stderr=written, env=environment, start_new_session=True)
    try:
        _wait(server, port, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        _stop(server)


def check(peer: Peer, folder: Path, model: Path, out: Path, only: Sequence[str], steps: Sequence[str]) -> None:
    """Start the server and keep the reports on it.

    Args:
        peer: the server.
        folder: of its environment.
        model: that it serves.
        out: of the reports.
        only: names of checks; none: all.
        steps: ``check``: `pullback check backend`; ``diff``: `pullback diff` with the native backend, for each named loss.
    """
    name = peer.launcher.removesuffix("_server.py")
    path = os.pathsep.join([str(sdk_folder(peer, folder)), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": path, "TINKER_TELEMETRY": "0"}
    pullback = [sys.executable, "-W", "ignore", "-m", "pullback"]
    with serving(peer, folder, model) as url:
        if "check" in steps:
            command = [*pullback, "check", "backend", "--url", url, "--base-model", str(model), "--rank", _RANK]
            command += ["--dtype", peer.dtype, "--reference", str(model), "--timeout", str(peer.timeout)]
            command += ["--markdown", str(out / f"{name}.md"), "--json", str(out / f"{name}.json")]
            command += [word for each in only for word in ("--only", each)]
            subprocess.run(command, env=environment, check=False)
        for loss in _LOSSES if "diff" in steps else ():
            command = [*pullback, "diff", "--a", f"native:{model}", "--b", f"remote:{url}", "--dtype-b", peer.dtype]
            command += ["--loss", loss, "--lengths", "9,6,12,5", "--rank", _RANK, "--allow-step"]
            subprocess.run([*command, "--json", str(out / f"{name}-{loss}.json")], env=environment, check=False)


def isolated_command(name: str, arguments: Sequence[str]) -> list[str]:
    """Return the command that repeats this one where there is no network but the loopback."""
    own = [sys.executable, "-m", "benchmarks.peer_servers", name, *arguments, "--inside"]
    as_root = [] if os.geteuid() == 0 else ["--map-root-user"]
    return ["unshare", *as_root, "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *own]


def _run(command: Sequence[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-5:])
        raise RuntimeError(f"{what} failed:\n{last}")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def _wait(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + _START
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"the server has ended with status {server.returncode}:\n{_last(log)}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/healthz", timeout=5):
                return
        except urllib.error.HTTPError:
            return  # it answers, if not on this route
        except OSError:
            time.sleep(1.0)
    raise RuntimeError(f"the server has not answered within {_START:g} s:\n{_last(log)}")


def _last(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").strip().splitlines()[-15:])


def _stop(server: subprocess.Popen[bytes]) -> None:
    """End the server and what it has started, which is its session."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(_STOP)
            break
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)  # what it has left behind
