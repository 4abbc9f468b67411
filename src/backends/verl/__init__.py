"""A backend on an engine of verl's (extra ``verl``): its FSDP on as many processes as it runs on."""

from .backend import VerlEngineBackend

__all__ = ["VerlEngineBackend"]
