"""Work in forked processes: each begins where this one stands, and leaves nothing behind but one result."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Ended", "Job", "in_forks", "limit"]


class Job(NamedTuple):
    """Something to do in a process of its own.

    Attributes:
        name: what is being done.
        work: does it, and returns what can be written as JSON.
    """

    name: Any
    work: Callable[[], Any]


class Ended(NamedTuple):
    """How a job ended.

    Attributes:
        name: of the job.
        result: what its work returned; None where a signal ended it.
        signal: the signal's number, or 0.
    """

    name: Any
    result: Any
    signal: int


def in_forks(jobs: Iterable[Job], workers: int, folder: Path) -> Iterator[Ended]:
    """Do every job in a forked process, some at a time, and yield each as it ends.

    A job that a signal ends, e.g. that of `limit`, is no error; what it started is ended with it.

    Args:
        jobs: taken one by one, each when a worker is free.
        workers: processes at a time.
        folder: where results are written.

    Raises:
        RuntimeError: the work of a job raised.
    """
    waiting = iter(jobs)
    running: dict[int, Job] = {}
    try:
        while True:
            while len(running) < workers and (job := next(waiting, None)):
                running[_fork(job, folder)] = job
            if not running:
                return
            pid, status = os.wait()
            job = running.pop(pid)
            _end(pid)
            yield _ended(job, status, folder / f"{pid}.json")
    finally:
        for pid in running:
            os.kill(pid, signal.SIGKILL)  # it may not lead a group yet
            _end(pid)
            os.waitpid(pid, 0)


def limit(seconds: float) -> None:
    """Let this process be ended after so many seconds of its processors' time, or twenty times as many on the clock.

    A machine that is busy with something else makes no endless loop of a test; a test that waits for ever ends all the same.
    """
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 20 * seconds)


def _fork(job: Job, folder: Path) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads that the fork does not have: none of them holds a lock here
        pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        for number in (signal.SIGALRM, signal.SIGPROF):
            signal.signal(number, signal.SIG_DFL)
        silence = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(silence, stream)
        (folder / f"{os.getpid()}.json").write_text(json.dumps(job.work()))
        code = 0
    except BaseException:
        (folder / f"{os.getpid()}.json").write_text(traceback.format_exc())
    finally:
        os._exit(code)


def _ended(job: Job, status: int, path: Path) -> Ended:
    text = path.read_text() if path.exists() else ""
    path.unlink(missing_ok=True)
    if os.WIFSIGNALED(status):
        return Ended(job.name, None, os.WTERMSIG(status))
    if os.WEXITSTATUS(status):
        raise RuntimeError(f"{job.name} ended with status {os.WEXITSTATUS(status)}: {text}")
    return Ended(job.name, json.loads(text), 0)


def _end(pid: int) -> None:
    """End a process and those that it has started; each job leads a group of its own."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
