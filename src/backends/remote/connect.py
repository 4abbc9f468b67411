"""connect: a backend on a service, in one line."""

from __future__ import annotations

import os
from typing import Any, Final
from urllib.parse import urlsplit

from .backend import RemoteBackend
from .capabilities import detect
from .convert import ready, sdk
from .failures import at_service

__all__ = ["connect"]

_LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")
_NO_KEY: Final = "tml-none"  # the SDK wants a key, and of this form


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
        api_key: with a URL; default: what the SDK finds in its environment, and none at all on this machine.
        lora: more of the SDK's options, e.g. ``seed`` or ``train_unembed``.
        options: of `RemoteBackend`.

    Raises:
        MissingExtraError: the tinker SDK is not installed.
        RemoteError: the service cannot be reached, does not know the key, or refuses the model.
    """
    if not isinstance(service, str):
        with at_service("connect"):
            trainer = ready(service.create_lora_training_client(base_model, rank=rank, **(lora or {})))
        return RemoteBackend(service, trainer, base_model=base_model, **options)
    key = api_key or os.environ.get("TINKER_API_KEY") or (_NO_KEY if _is_here(service) else None)
    found = detect(service, key, base_model)
    with at_service(f"connect to {service}"):
        client = sdk().ServiceClient(base_url=service, api_key=key)
        try:
            trainer = ready(client.create_lora_training_client(base_model, rank=rank, **(lora or {})))
        except BaseException:
            client.__exit__(None, None, None)
            raise
    return RemoteBackend(
        client, trainer, base_model=base_model, **{"capabilities": found, "owns_service": True, **options}
    )


def _is_here(url: str) -> bool:
    return urlsplit(url).hostname in _LOOPBACK
