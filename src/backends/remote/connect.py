"""connect: a backend on a service, in one line."""

from __future__ import annotations

from typing import Any

from .backend import RemoteBackend
from .capabilities import detect
from .convert import ready, sdk

__all__ = ["connect"]


def connect(
    service: Any,
    *,
    base_model: str,
    rank: int = 32,
    api_key: str | None = None,
    lora: dict[str, Any] | None = None,
    **options: Any,
) -> RemoteBackend:
    """Create a LoRA model at a service and return a backend on it.

    Args:
        service: base URL, which is asked what it can do; or a ``ServiceClient`` of the tinker SDK or of a fork of it, which
            is taken to speak the plain protocol unless ``capabilities`` are given.
        base_model: name of the model there.
        rank: of the adapter.
        api_key: with a URL; default: what the SDK finds in its environment.
        lora: more of the SDK's options, e.g. ``seed`` or ``train_unembed``.
        options: of `RemoteBackend`.

    Raises:
        MissingExtraError: the tinker SDK is not installed.
    """
    client = sdk().ServiceClient(base_url=service, api_key=api_key) if isinstance(service, str) else service
    trainer = ready(client.create_lora_training_client(base_model, rank=rank, **(lora or {})))
    if isinstance(service, str):
        options = {"capabilities": detect(service, api_key, base_model), "owns_service": True, **options}
    return RemoteBackend(client, trainer, base_model=base_model, **options)
