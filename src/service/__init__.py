"""A service that speaks the Tinker training protocol (extra ``serve``)."""

from __future__ import annotations

from .app import build_app
from .serving import serving
from .tenants import Base, Tenants

__all__ = ["Base", "Tenants", "build_app", "serving"]
