"""The remote backend: services that speak the Tinker training API, through their official SDK."""

from __future__ import annotations

from .backend import RemoteBackend
from .capabilities import Capabilities
from .connect import connect
from .connection.futures import RemoteFuture

__all__ = ["Capabilities", "RemoteBackend", "RemoteFuture", "connect"]
