"""A service that speaks the Tinker training protocol (extra ``serve``)."""

from __future__ import annotations

from .http.app import build_app
from .http.server import serving
from .served.registry import Base, Tenants

__all__ = ["Base", "Tenants", "build_app", "serving"]
