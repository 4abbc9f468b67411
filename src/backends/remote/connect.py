"""connect: a backend on a service, in one line."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any, Final
from urllib.parse import urlsplit

from ..native.models.lora import LoraChoice
from .backend import RemoteBackend
from .capabilities import detect
from .connection.liveness import Liveness
from .connection.probe import ask_capabilities
from .sdk.convert import ready
from .sdk.error_mapping import at_service
from .sdk.sdks import sdk_named

__all__ = ["connect"]

_LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")
_NO_KEY: Final = "tml-none"  # the SDK wants a key, and of this form


def connect(
    service: Any,
    *,
    base_model: str,
    rank: int = LoraChoice.rank,
    api_key: str | None = None,
    lora: dict[str, Any] | None = None,
    sdk: str = "tinker",
    **options: Any,
) -> RemoteBackend:
    """Create a LoRA model at a service and return a backend on it.

    Args:
        service: base URL, which is asked what it can do, or a ``ServiceClient`` of one of the SDKs, which is taken to speak
            the plain protocol; unless ``capabilities`` are given.
        base_model: name of the model there.
        rank: of the adapter.
        api_key: with a URL; default: what the SDK finds in its environment, and none at all on this machine.
        lora: more of the SDK's options, e.g. ``seed``. What it leaves out is as `LoraChoice` has it: ``train_unembed`` is
            False, where the SDKs say True.
        sdk: with a URL: ``tinker``, or ``fireworks``.
        options: of `RemoteBackend`.

    Raises:
        MissingExtraError: the SDK is not installed.
        ConfigError: the address is none.
        RemoteError: the service cannot be reached, is something else, does not know the key, or refuses the model.
    """

    def create(client: Any) -> Any:
        asked = {"train_unembed": LoraChoice.train_unembed, **(lora or {})}
        return ready(client.create_lora_training_client(base_model, rank=rank, **asked), options.get("timeout"))

    if not isinstance(service, str):
        with at_service("connect"):
            trainer = create(service)
        return RemoteBackend(service, trainer, base_model=base_model, **options)
    chosen = sdk_named(sdk)
    key = chosen.key(api_key) or (_NO_KEY if _is_here(service) else "")
    if options.get("capabilities") is None:
        capabilities = detect(service, key, base_model, chosen.plain)
        options["capabilities"] = replace(
            capabilities,
            normalizes=capabilities.normalizes and chosen.normalizes,
            takes_divisor=capabilities.takes_divisor and chosen.sends_divisor,
        )
    else:
        ask_capabilities(service, key, must_answer=False)  # what is no service is said now; the SDK would take minutes
    liveness = Liveness(service)
    with at_service(f"connect to {service}"):
        client = chosen.connect(service, key or None)
        try:
            with liveness.explaining("create_model", options.get("timeout")):
                trainer = create(client)
        except BaseException:
            with suppress(Exception):  # the one on its way out matters more
                liveness.end(lambda: chosen.close(client, None), options.get("timeout"))
            raise
    return RemoteBackend(client, trainer, base_model=base_model, **{"owns_service": True, "url": service, **options})


def _is_here(url: str) -> bool:
    return urlsplit(url).hostname in _LOOPBACK
