"""A service under test, by its address: models of it, the network between, and what it says of itself."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, Final

import torch

from ...backends.protocol import TrainerBackend
from ...backends.remote.connect import connect
from ...errors import require_extra
from ..network.faults import Fault, misbehaving
from ..under_test import BackendUnderTest, closing
from .actions import train

__all__ = ["TOLERANCES", "client_versions", "service_under_test"]

# relative difference of updates, and nats, between two ways to compute the same thing in a dtype
TOLERANCES: Final[Mapping[str, tuple[float, float]]] = {
    "float64": (1e-3, 1e-4),  # log-probs travel in fp32
    "float32": (1e-3, 1e-4),
    "float16": (
        0.15,
        0.02,
    ),  # of a tiny model whose fp32 weights are rounded for each forward, with a margin of about two
    "bfloat16": (0.3, 0.06),
}
_LOST: Final = {
    ("forward_backward", 1): Fault("drop_response"),
    ("forward_backward", 3): Fault("duplicate"),
    ("optim_step", 1): Fault("drop_response"),
    ("optim_step", 3): Fault("duplicate"),
}


def service_under_test(
    url: str,
    base_model: str,
    *,
    rank: int = 8,
    vocab_size: int = 17,
    dtype: str = "float32",
    api_key: str | None = None,
    timeout: float | None = 300.0,
    **options: Any,
) -> BackendUnderTest:
    """Return a Tinker-shaped service as a backend under test; every fresh backend is a new model there.

    Args:
        url: base URL.
        base_model: its name there.
        rank: of the adapters.
        vocab_size: token ids are below it.
        dtype: that the service computes in, which sets the tolerances.
        api_key: of the service.
        timeout: seconds that an answer waits.
        options: of `pullback.connect`.

    Raises:
        RemoteError: the service cannot be reached, does not know the key, or refuses the model.
    """

    def make(seed: int = 0, address: str = url) -> TrainerBackend:
        asked = {"seed": seed, **options.get("lora", {})}
        return connect(
            address, base_model=base_model, rank=rank, api_key=api_key, timeout=timeout, **{**options, "lora": asked}
        )

    @contextmanager
    def unreliable() -> Iterator[TrainerBackend]:
        with misbehaving(url, _LOST) as proxy, closing(make(address=proxy.url)) as backend:
            yield backend

    tolerance, nats = TOLERANCES[dtype]
    found = BackendUnderTest(
        make,
        vocab_size,
        tolerance,
        nats=nats,
        name=f"{base_model} at {url}",
        facts={**client_versions(), **_told(url, api_key), "rank": str(rank), "dtype": dtype, **_told_of(options)},
        seeded=make,
        unreliable=unreliable,
    )
    return comparable(found)


def comparable(under_test: BackendUnderTest) -> BackendUnderTest:
    """Return a service whose fresh models train alike: by their seed, or by one checkpoint that all of them load.

    A service that cannot make a step is returned as it is: its checks will say what fails.
    """
    try:
        if _alike(under_test):
            return _known(under_test, "by their seed")
    except Exception:
        return under_test
    reason = "two new models of one seed train differently"
    with under_test.backend() as backend:
        try:
            path = backend.save_state("conformance-start").result().path
            common = replace(under_test, make=_loading(under_test.make, path), _measured={})
            if _alike(common):
                return _known(
                    common, "by a checkpoint that each of them loads, as two models of one seed train differently"
                )
        except Exception as error:
            reason = f"{reason}, and a checkpoint does not load: {type(error).__name__}: {error}"
    return replace(_known(under_test, "no"), incomparable=reason)


def _alike(under_test: BackendUnderTest) -> bool:
    script = train(under_test.params, [under_test.data()])
    start, first, again = under_test.start(), under_test.after(script), under_test.after(script)
    return float((first - again).norm()) <= under_test.tolerance * float((first - start).norm())


def _known(under_test: BackendUnderTest, how: str) -> BackendUnderTest:
    return replace(under_test, facts={**under_test.facts, "new models begin alike": how})


def client_versions() -> dict[str, str]:
    """Return the versions of what runs in this process."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("pullback", "tinker", "transformers", "peft"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _told_of(options: Mapping[str, Any]) -> dict[str, str]:
    return {name.replace("_", " "): str(value) for name, value in options.items() if value}


def _loading(make: Callable[[], TrainerBackend], path: str) -> Callable[[], TrainerBackend]:
    def loaded() -> TrainerBackend:
        backend = make()
        backend.load_state_with_optimizer(path).result()
        return backend

    return loaded


def _told(url: str, api_key: str | None) -> dict[str, str]:
    """Return what a service says of itself; most say little."""
    httpx = require_extra("httpx", "remote", "pullback check backend --url")
    found = {"address": url}
    for route in ("get_server_capabilities", "healthz"):
        with suppress(httpx.HTTPError, ValueError):
            answer = httpx.get(
                f"{url.rstrip('/')}/api/v1/{route}", headers={"X-API-Key": api_key or "tml-none"}, timeout=30
            )
            found["server"] = answer.headers.get("server", "unknown")
            found[route] = json.dumps(answer.json())[:300] if answer.status_code < 400 else f"HTTP {answer.status_code}"
    return found
