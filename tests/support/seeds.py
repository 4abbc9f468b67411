"""Random numbers of a test depend on its name alone, not on the tests that ran before it on the same worker."""

from __future__ import annotations

import os
import random
import secrets
import zlib
from typing import Final

import torch
from tiers import TIER

__all__ = ["SEED", "seed"]

# The long proofs draw anew each time. PULLBACK_SEED=... repeats a run, or gives the shorter tiers other numbers.
SEED: Final = os.environ.setdefault("PULLBACK_SEED", secrets.token_hex(4) if TIER == "soak" else "0")


def seed(name: str) -> None:
    """Seed torch and ``random`` with a test's or a fixture's name, and with the run's seed."""
    number = zlib.crc32(f"{SEED} {name}".encode())
    torch.manual_seed(number)
    random.seed(number)
