"""The demo: four objectives on a real model, through the backend protocol alone."""

from __future__ import annotations

from .run import main

__all__ = ["main"]
