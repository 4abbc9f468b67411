"""Tools that prove losses and backends right: tiny exact models, cases, oracles, properties.

`pullback.testing.strategies` needs hypothesis and is imported by name.
"""

from __future__ import annotations

from . import oracles
from .cases import Case, CaseSequence
from .leaky import FutureLeakLM, PackingLeakLM, RowLeakLM
from .properties import check_loss, cotangent
from .resume import verify_resume
from .tiny import TinyLM

__all__ = [
    "Case",
    "CaseSequence",
    "FutureLeakLM",
    "PackingLeakLM",
    "RowLeakLM",
    "TinyLM",
    "check_loss",
    "cotangent",
    "oracles",
    "verify_resume",
]
