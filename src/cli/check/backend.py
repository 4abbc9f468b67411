"""``pullback check backend``: does a backend, or a service by its address, do what every backend must?"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from ...backends import FakeBackend, TorchBackend, TrainerBackend, connect
from ...backends.native import HFModel
from ...backends.remote.connection.probe import ask_capabilities
from ...errors import ConfigError, suggestion
from ...testing import PROMISES, BackendUnderTest, TinyLM
from ...testing.conformance import Check, backend_report
from ...testing.conformance.report import line_of
from ...testing.conformance.services import TOLERANCES, client_versions, service_under_test
from ..arguments.models import MODEL_HELP, load_named
from ..arguments.parser import listing
from ..processes import ALONE, Processes

__all__ = ["add_parser"]

_VOCAB_SIZE: Final = 17  # token ids of the example datums; every real vocabulary is larger
_DTYPES: Final = ("float64", "float32", "bfloat16")  # of the rows of the table of precision


def add_parser(checks: Any) -> None:
    """Add the command to a parser."""
    backend = checks.add_parser(
        "backend",
        help="every promise of a backend, by its verbs alone",
        description="Check the native backend, or a service, by the verbs that all backends have.",
        epilog=listing("checks", {name: each.promise for name, each in PROMISES.items()}),
    )
    backend.add_argument(
        "--url", help="address of a service, e.g. http://127.0.0.1:8765 (default: the native backend is checked)"
    )
    backend.add_argument("--base-model", help="name of the base model at the service")
    backend.add_argument("--api-key", help="API key of the service (default: the one that its SDK finds)")
    backend.add_argument("--rank", type=int, default=8, help="rank of the adapters at the service")
    deferred = (
        "send cotangents at the step, so that they can be divided by any count where a service only adds gradients up"
    )
    backend.add_argument("--defer-backward", action="store_true", help=deferred)
    backend.add_argument("--timeout", type=float, default=300.0, help="seconds to wait for an answer of the service")
    backend.add_argument(
        "--kind", choices=("native", "fake"), default="native", help="the backend to check where no --url is given"
    )
    backend.add_argument(
        "--dtype", choices=tuple(TOLERANCES), default="float32", help="the backend's dtype, which sets the tolerances"
    )
    backend.add_argument(
        "--tolerance",
        type=float,
        help="largest relative difference of two updates that should be equal (default: that of the dtype)",
    )
    reference = (
        f"what to compare log-probs with: the address of another service, or a model that is run in fp64: {MODEL_HELP}"
    )
    backend.add_argument("--reference", help=f"{reference} (default: a backend in fp64; of a service none)")
    backend.add_argument(
        "--only", action="append", help="name of a check to run, see below; may be given several times"
    )
    backend.add_argument("--markdown", type=Path, metavar="FILE", help="write the report as Markdown")
    backend.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON")
    backend.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    """Print a line for each check; the status is 1 if a promise is broken."""
    checks = _chosen(arguments.only)
    processes = Processes.here()
    if processes.ranks is not None and (arguments.url is not None or arguments.kind == "fake"):
        raise ConfigError("only the native backend runs on several processes; start this check without torchrun")
    under_test = _under_test(arguments, processes)

    def say(text: str) -> None:
        if processes.first:
            print(text, flush=True)

    report = backend_report(under_test, checks, told=lambda result: say(line_of(result)))
    say(report.summary)
    if not processes.first:
        return int(bool(report.failed))
    if arguments.markdown is not None:
        arguments.markdown.write_text(report.as_markdown())
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report.as_json(), indent=1) + "\n")
    return int(bool(report.failed))


def _chosen(names: list[str] | None) -> list[Check]:
    unknown = [name for name in names or () if name not in PROMISES]
    if unknown:
        close = suggestion(unknown[0], PROMISES)
        raise ConfigError(f"there is no check {unknown[0]!r}{close}; there are: {', '.join(PROMISES)}")
    return [check for name, check in PROMISES.items() if not names or name in names]


def _under_test(arguments: argparse.Namespace, processes: Processes) -> BackendUnderTest:
    found = _service(arguments) if arguments.url is not None else _own(arguments, processes)
    found = replace(found, facts={**found.facts, "command": _command(arguments)})
    if arguments.tolerance is not None:
        found = replace(found, tolerance=arguments.tolerance)
    if arguments.reference is not None:
        found = replace(found, reference=_reference(arguments), reference_trains=False)
    return found


def _command(arguments: argparse.Namespace) -> str:
    """Return the command that examines the same backend, without what is secret and without what was left out."""
    told = ("url", "base_model", "rank", "kind", "dtype", "tolerance", "reference")
    given = {name: getattr(arguments, name) for name in told if getattr(arguments, name) is not None}
    for name in ("kind",) if arguments.url is not None else ("rank",):
        del given[name]
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return shlex.join(["pullback", "check", "backend", *words, *["--defer-backward"] * arguments.defer_backward])


def _service(arguments: argparse.Namespace) -> BackendUnderTest:
    if arguments.base_model is None:
        raise ConfigError("--url needs --base-model: the name by which the service knows its model")
    # Where nobody answers, every check would say so.
    ask_capabilities(arguments.url, arguments.api_key or os.environ.get("TINKER_API_KEY", ""))
    return service_under_test(
        arguments.url,
        arguments.base_model,
        rank=arguments.rank,
        vocab_size=_VOCAB_SIZE,
        dtype=arguments.dtype or "float32",
        api_key=arguments.api_key,
        timeout=arguments.timeout,
        defer_backward=arguments.defer_backward,
    )


def _own(arguments: argparse.Namespace, processes: Processes) -> BackendUnderTest:
    if arguments.kind == "fake":
        exact = FakeBackend
        return BackendUnderTest(
            exact, name="FakeBackend", facts=client_versions(), seeded=_fake, reference=exact, reference_trains=True
        )
    dtype = arguments.dtype or "float64"
    tolerance, nats = TOLERANCES[dtype]
    native = partial(_native, processes)

    def variant(dtype: str) -> Callable[[], TrainerBackend]:
        return lambda: native(dtype=dtype)

    return BackendUnderTest(
        variant(dtype),
        _VOCAB_SIZE,
        tolerance,
        nats=nats,
        name=f"TorchBackend on TinyLM in {dtype}",
        facts=client_versions() | ({"processes": str(processes.ranks.size)} if processes.ranks is not None else {}),
        seeded=lambda seed: native(seed, dtype),
        reference=partial(_native, ALONE, mesh=None),
        reference_trains=True,
        variants={dtype: variant(dtype) for dtype in _DTYPES},
    )


def _native(processes: Processes, seed: int = 0, dtype: str = "float64", **options: Any) -> TrainerBackend:
    model = TinyLM(_VOCAB_SIZE, seed=seed, dtype=getattr(torch, dtype))
    return TorchBackend(model, checkpoint_dir=processes.same(tempfile.mkdtemp()), **options)


def _fake(seed: int) -> TrainerBackend:
    return FakeBackend(seed=seed)


def _reference(arguments: argparse.Namespace) -> Callable[[], TrainerBackend]:
    """Return what makes a backend that scores as it should: on a named model, or at another service."""
    name = arguments.reference
    if "://" in name:
        return lambda: connect(name, base_model=arguments.base_model, rank=arguments.rank, api_key=arguments.api_key)
    return lambda: TorchBackend(HFModel(load_named(name, dtype="float64").model), layout="single")
