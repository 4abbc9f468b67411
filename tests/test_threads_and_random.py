"""Other threads may use Python's random numbers while a property draws its examples."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisDeprecationWarning


@st.composite
def slow_numbers(draw: st.DrawFn) -> int:
    time.sleep(0.02)
    return draw(st.integers())


@settings(max_examples=5)
@given(number=slow_numbers())
def draw_some(number: int) -> None:
    assert number == number


@pytest.fixture
def another_thread() -> Iterator[None]:
    """A thread that draws random numbers all the time, as the heartbeats of clients do now and then."""
    ended = threading.Event()

    def use() -> None:
        while not ended.wait(0.001):
            random.random()

    thread = threading.Thread(target=use)
    thread.start()
    yield
    ended.set()
    thread.join()


@pytest.mark.usefixtures("another_thread")
def test_random_numbers_elsewhere_fail_no_property() -> None:
    """Hypothesis takes them for the strategy's own, and warns, which is no error here."""
    draw_some()


@pytest.mark.usefixtures("another_thread")
def test_hypothesis_warns() -> None:
    """The control: the warning that is left aside above is given."""
    with pytest.warns(HypothesisDeprecationWarning, match="Do not use the `random` module"):
        draw_some()
