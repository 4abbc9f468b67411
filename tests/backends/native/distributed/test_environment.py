"""What torchrun sets is read as it sets it, and anything else is refused in words."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from pullback.backends.native.distributed.environment import process_count
from pullback.backends.native.distributed.ranks import find_mesh
from pullback.errors import ConfigError

SET = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_what_torchrun_sets() -> None:
    """Its count; one process without it, and with it where it starts one."""
    assert process_count(SET) == 2
    assert process_count({}) == process_count({"WORLD_SIZE": "1", "RANK": "not read"}) == 1


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE must be a whole number of at least 1, got 'abc'"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE must be a whole number of at least 1, got ''"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be a whole number of at least 1, got '0'"),
        ({"RANK": "first"}, "RANK must be a whole number from 0 to 1, got 'first'"),
        ({"RANK": "2"}, "RANK must be a whole number from 0 to 1, got '2'"),
        ({"RANK": "-1"}, "RANK must be a whole number from 0 to 1, got '-1'"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT must be a whole number from 0 to 65535, got 'http'"),
        (
            {"MASTER_PORT": "65536", "RANK": "1.0"},
            "RANK .* got '1.0', MASTER_PORT .* got '65536'; start this with torchrun",
        ),
        ({"RANK": None, "MASTER_ADDR": None}, "RANK is not set, MASTER_ADDR is not set; start this with torchrun"),
    ],
)
def test_what_torchrun_does_not_set(
    changed: dict[str, str | None], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every variable that is wrong is named, and what to do; so does a backend that looks for its processes."""
    given = {name: value for name, value in {**SET, **changed}.items() if value is not None}
    with pytest.raises(ConfigError, match=words):
        process_count(given)
    if dist.is_available():
        for name in SET:
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ConfigError, match=words):
            find_mesh("auto", torch.device("cpu"), 1.0)
