"""Processes that torchrun starts again find each other, and not those that have ended."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pullback.backends.native.distributed.ranks import find_mesh

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this build of PyTorch has no torch.distributed")


def test_a_new_start_reads_no_address_of_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store that torchrun keeps over a restart has an entry of its own for each start."""
    kept = dist.HashStore()  # type: ignore[attr-defined]
    given: list[Any] = []
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **options: iter([(kept, 0, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: given.append(options))
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    for start in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", start)
        find_mesh("auto", torch.device("cpu"), 5.0)
    first, second = (options["store"] for options in given)
    first.set("address", "of a process that has ended")
    assert first.check(["address"])
    assert not second.check(["address"])
    assert [(options["rank"], options["world_size"]) for options in given] == [(0, 2), (0, 2)]
    assert all(options["timeout"] == timedelta(seconds=5) for options in given)
