"""A backend without a model, for tests of training loops."""

from __future__ import annotations

from .backend import Call, FakeBackend

__all__ = ["Call", "FakeBackend"]
