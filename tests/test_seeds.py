"""Random numbers of tests."""

from __future__ import annotations

import random

import pytest
import torch
from seeds import seed


@pytest.fixture(scope="module")
def drawn() -> float:
    return float(torch.rand(()))


def numbers() -> tuple[float, float]:
    return float(torch.rand(())), random.random()


def test_numbers_depend_on_the_name_alone(request: pytest.FixtureRequest, drawn: float) -> None:
    """Those of a test and of a fixture of its module, whatever has been drawn before; other names have others."""
    here = numbers()
    seed(request.node.nodeid)
    assert numbers() == here
    seed("tests/test_seeds.py drawn")
    assert float(torch.rand(())) == drawn
    seed("another")
    assert not set(numbers()) & {*here, drawn}
