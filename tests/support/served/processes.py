"""A service over a tiny model in its own process, which tests can kill and start again on the same folder."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx
from ports import reserved_port

__all__ = ["CommandProcess", "ServerProcess"]

ROOT = Path(__file__).parents[3]

# Imported once in the fork server, so that a server process starts in a fraction of a second.
_HEAVY = ["torch", "transformers.models.llama.modeling_llama", "peft", "starlette.applications", "uvicorn", "zstandard"]
_START_SECONDS = 240.0  # imports take a minute where four times as many processes as cores run


def _serve(folder: Path, options: dict[str, Any], connection: Connection) -> None:
    import torch
    from servers import KEY, tiny_models

    from pullback.service import serving
    from pullback.service.limits import Limits

    torch.set_num_threads(1)
    with serving(tiny_models(folder), keys=[KEY], limits=Limits(**options)) as url:
        connection.send(url)
        connection.recv()


class ServerProcess:
    """A service on a folder; `kill` sends SIGKILL.

    Attributes:
        url: base URL.
    """

    def __init__(self, folder: Path, **limits: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_HEAVY)
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(folder, limits, theirs), daemon=True)
        self._process.start()
        theirs.close()
        if not self._ours.poll(_START_SECONDS):
            raise RuntimeError("the server process did not start")
        self.url: str = self._ours.recv()

    @property
    def pid(self) -> int:
        """Return the id of the process."""
        assert self._process.pid is not None
        return self._process.pid

    def kill(self) -> None:
        """Kill the process without warning."""
        self._process.kill()
        self._process.join()
        self._ours.close()


class CommandProcess:
    """``pullback serve`` itself, on a model folder.

    Attributes:
        url: base URL.
    """

    def __init__(self, folder: Path, model: Path, key: str) -> None:
        port = reserved_port()
        self.url = f"http://127.0.0.1:{port}"
        options = ["--model", model, "--name", "tiny", "--port", port, "--checkpoints", folder, "--token-budget", 64]
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT / ".alias"),
            "PULLBACK_API_KEYS": key,
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "pullback", "serve", *map(str, options)]
        self._process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        self._await(key)

    def _await(self, key: str) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                httpx.get(f"{self.url}/api/v1/healthz", headers={"x-api-key": key})
                return
            except httpx.TransportError:
                time.sleep(0.05)
        self.kill()
        raise RuntimeError("pullback serve did not start")

    def end(self, signal: int) -> None:
        """Ask the process to end, and wait until it has."""
        self._process.send_signal(signal)
        self._process.wait(_START_SECONDS)

    def kill(self) -> None:
        """Kill the process without warning."""
        self._process.kill()
        self._process.wait()
