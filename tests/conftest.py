"""The tiers: how many examples a property test draws, and which tests wait for a longer run. And common fixtures."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings
from seeds import SEED, seed
from tiers import TIER, reason_to_skip

gc.disable()  # until all tests are collected: they stay
torch.set_num_threads(1)  # the models are tiny: threads only wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start

# One profile a tier. What is derandomized draws the same examples in every run and on every worker.
settings.register_profile("quick", max_examples=5, deadline=None, derandomize=True)
settings.register_profile("all", max_examples=20, deadline=None, derandomize=True)
settings.register_profile("soak", max_examples=2000, deadline=None)
# For mutation testing, which only asks whether a test fails: a failing example is not made smaller.
settings.register_profile("unshrunk", settings.get_profile(TIER), phases=(Phase.explicit, Phase.generate))
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", TIER))


def pytest_report_header() -> str:
    return f"tier: {TIER} (PULLBACK_TIER=quick|all|soak), seed: {SEED} (PULLBACK_SEED)"


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> None:
    seed(f"{fixturedef.baseid} {fixturedef.argname}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    seed(item.nodeid)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for marker in ("slow", "soak"):
            reason = reason_to_skip(marker) if item.get_closest_marker(marker) else None
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish() -> None:
    """Keep the garbage collector from going through thousands of tests again and again."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()


_left_open: set[Path] = set()  # modules of which a test ignored what the SDK leaves open


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Collect what a module's SDK has left open while its warnings are ignored, not in the middle of another's test."""
    yield
    if any("ResourceWarning" in str(mark.args) for mark in item.iter_markers("filterwarnings")):
        _left_open.add(item.path)
    if item.path in _left_open and (nextitem is None or nextitem.path != item.path):
        _left_open.discard(item.path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from servers import tiny_models

    return tiny_models(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def url(models: Any) -> Iterator[str]:
    from servers import KEY

    from pullback.service import serving

    with serving(models, keys=[KEY]) as address:
        yield address


@pytest.fixture
def direct(tmp_path: Path) -> Iterator[Any]:
    """A service without its routes, with one model."""
    from servers import Direct

    found = Direct(tmp_path)
    found.start()
    yield found
    found.sequencer.close()


@pytest.fixture
def gaps(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets the time that services wait for a missing number pass; they are made after it."""
    from served.gaps import Gaps

    return Gaps(monkeypatch)


@pytest.fixture
def service(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The official SDK's client."""
    import tinker
    from servers import KEY

    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    with tinker.ServiceClient(base_url=url, api_key=KEY) as client:
        yield client


@pytest.fixture
def web() -> Iterator[Any]:
    """Makes plain HTTP clients, and closes them."""
    from contextlib import ExitStack

    from servers import rest

    with ExitStack() as stack:
        yield lambda *given: stack.enter_context(rest(*given))


@pytest.fixture
def connect(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes remote backends on fresh adapters, and ends their sessions."""
    from servers import KEY

    import pullback

    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    made: list[Any] = []

    def make(**options: Any) -> Any:
        made.append(pullback.connect(url, base_model="tiny", rank=4, api_key=KEY, lora={"seed": 3}, **options))
        return made[-1]

    yield make
    for backend in made:
        backend._service.__exit__(None, None, None)


@pytest.fixture
def fireworks(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Fireworks' client."""
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    from clients.fireworks_sdk import finish, sdk
    from servers import KEY

    client = sdk.ServiceClient(base_url=url, api_key=KEY)
    yield client
    finish(client, url)
