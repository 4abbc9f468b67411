"""Losses on given target tokens."""

from __future__ import annotations

from .cross_entropy import CrossEntropy

__all__ = ["CrossEntropy"]
