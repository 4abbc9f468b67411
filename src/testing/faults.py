"""The former place of `pullback.testing.network.faults`; it works for one release."""

from __future__ import annotations

from ..deprecation import moved

_NAMES = ("FAULT_KINDS", "Exchange", "Fault", "FaultKind", "FaultyProxy", "Schedule", "misbehaving")

__getattr__ = moved(__name__, {name: ("testing.network.faults", name) for name in _NAMES})
