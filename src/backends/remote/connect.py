"""connect: a backend on a service, in one line."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final
from urllib.parse import urlsplit

from ..native.models.lora import LoraChoice
from .backend import RemoteBackend
from .capabilities import Capabilities, detect
from .connection.liveness import Liveness
from .connection.probe import ask_capabilities
from .sdk.convert import ready
from .sdk.error_mapping import at_service
from .sdk.sdks import Sdk, sdk_named

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
        options["capabilities"] = _detected(service, key, base_model, chosen)
    else:
        ask_capabilities(service, key, must_answer=False)  # what is no service is said now; the SDK would take minutes
    client, trainer = _client_with(create, service, chosen, key, options.get("timeout"))
    own = {"owns_service": True, "url": service, "api_key": key}
    return RemoteBackend(client, trainer, base_model=base_model, **{**own, **options})


def _detected(url: str, key: str, base_model: str, sdk: Sdk) -> Capabilities:
    """Ask a service what it can do, and leave out what the SDK has no words for."""
    found = detect(url, key, base_model, sdk.plain)
    return replace(
        found,
        normalizes=found.normalizes and sdk.normalizes,
        takes_divisor=found.takes_divisor and sdk.sends_divisor,
    )


def _client_with(create: Callable[[Any], Any], url: str, sdk: Sdk, key: str, timeout: float | None) -> tuple[Any, Any]:
    """Return an SDK's client and what ``create`` makes of it; the client is closed if that fails."""
    liveness = Liveness(url)
    with at_service(f"connect to {url}"):
        client = sdk.connect(url, key or None)
        try:
            with liveness.explaining("create_model", timeout):
                return client, create(client)
        except BaseException:
            with suppress(Exception):  # the one on its way out matters more
                liveness.end(lambda: sdk.close(client, None), timeout)
            raise


def _is_here(url: str) -> bool:
    return urlsplit(url).hostname in _LOOPBACK
