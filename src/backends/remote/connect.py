"""connect: a backend on a service, in one line."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .backend import RemoteBackend
from .capabilities import detect
from .convert import ready
from .sdks import sdk_named, sdk_of

__all__ = ["connect"]


def connect(
    service: Any,
    *,
    base_model: str,
    rank: int = 32,
    api_key: str | None = None,
    lora: dict[str, Any] | None = None,
    sdk: str = "tinker",
    **options: Any,
) -> RemoteBackend:
    """Create a LoRA model at a service and return a backend on it.

    Args:
        service: base URL, which is asked what it can do; or a ``ServiceClient`` of one of the SDKs, which is taken to speak
            the plain protocol unless ``capabilities`` are given.
        base_model: name of the model there.
        rank: of the adapter.
        api_key: with a URL; default: what the SDK finds in its environment.
        lora: more of the SDK's options, e.g. ``seed`` or ``train_unembed``.
        sdk: with a URL: ``tinker``, or ``fireworks``.
        options: of `RemoteBackend`.

    Raises:
        MissingExtraError: the SDK is not installed.
    """
    if isinstance(service, str):
        chosen = sdk_named(sdk)
        client = chosen.connect(service, api_key)
        found = detect(service, chosen.key(api_key), base_model, chosen.plain)
        found = replace(found, normalizes=chosen.plain.normalizes)
        options = {"capabilities": found, "owns_service": True, **options}
    else:
        chosen, client = sdk_of(service), service
        options = {"capabilities": chosen.plain, **options}
    trainer = ready(client.create_lora_training_client(base_model, rank=rank, **(lora or {})))
    return RemoteBackend(client, trainer, base_model=base_model, **options)
