"""``pullback check backend``: does a backend keep every promise?"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from typing import Any

from ..backends import FakeBackend, TorchBackend, TrainerBackend, connect
from ..testing import PROMISES, Subject, TinyLM

__all__ = ["add_parser"]

_VOCABULARY = 17  # token ids of the examples; every real vocabulary is larger


def add_parser(commands: Any) -> None:
    """Add the command to a parser."""
    backend = commands.add_parser("backend", help="every promise of a backend, by its verbs alone")
    backend.add_argument("--url", help="of a service (default: the native backend)")
    backend.add_argument("--base-model", help="its name there")
    backend.add_argument("--rank", type=int, default=8, help="of the adapter there")
    backend.add_argument("--kind", choices=("native", "fake"), default="native", help="without --url")
    backend.add_argument("--tolerance", type=float, default=1e-3, help="of two ways to one update, relative to it")
    backend.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    """Print a line for each promise; status 1 if one is broken."""
    subject = Subject(_maker(arguments), _VOCABULARY, arguments.tolerance)
    broken = 0
    for name, check in PROMISES.items():
        try:
            check(subject)
            words = "kept"
        except Exception as error:  # whatever a broken backend raises is a finding
            broken += 1
            words = f"BROKEN: {type(error).__name__}: {error}"
        print(f"{name.replace('_', ' '):34} {words}", flush=True)
    print(f"{len(PROMISES) - broken} of {len(PROMISES)} promises kept")
    return 1 if broken else 0


def _maker(arguments: argparse.Namespace) -> Callable[[], TrainerBackend]:
    if arguments.url is not None:
        lora = {"seed": 0}
        return lambda: connect(arguments.url, base_model=arguments.base_model, rank=arguments.rank, lora=lora)
    if arguments.kind == "fake":
        return FakeBackend
    return lambda: TorchBackend(TinyLM(_VOCABULARY), checkpoint_dir=tempfile.mkdtemp())
