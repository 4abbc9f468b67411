"""A service that speaks the Tinker training protocol (extra ``serve``)."""

from __future__ import annotations

from ..deprecation import moved
from .http.app import build_app
from .http.server import serving
from .served.registry import Base, ServedModels

__all__ = ["Base", "ServedModels", "build_app", "serving"]

__getattr__ = moved(__name__, {"Tenants": ("service", "ServedModels")})
