"""RemoteBackend: the protocol on a service that speaks the Tinker training API."""

from __future__ import annotations

from typing import Any, final

from ..base import Backend
from ..protocol import ReferenceModel
from .capabilities import Capabilities
from .engine import RemoteEngine
from .error_mapping import at_service
from .sdks import sdk_of

__all__ = ["RemoteBackend"]


@final
class RemoteBackend(Backend):
    """Trains a model at a Tinker-shaped service; the official SDK, or Fireworks', is the transport.

    A loss that the service knows by name runs there. Every other loss, and every function, runs here on log-probs from
    the service; its cotangent goes back as the weights of a cross-entropy.

    Where the service adds gradients up and has no division, a mean is divided here: by the call's own count if it is the
    only one of its accumulation, by ``counts=`` if given, or at `optim_step` with ``defer_backward``.

    Args:
        service: ``ServiceClient`` of the SDK.
        trainer: ``TrainingClient`` of the SDK.
        base_model: name of the base there, for the reference.
        capabilities: what the service does by itself; default: the plain protocol.
        defer_backward: hold cotangents until `optim_step`: any split into calls, and every normalisation, as natively;
            costs a second forward.
        timeout: seconds that a result, or a call that must wait for the service, waits; None = for ever.
        owns_service: `close` also closes the service's client, which ends its session.
    """

    def __init__(
        self,
        service: Any,
        trainer: Any,
        *,
        base_model: str,
        capabilities: Capabilities | None = None,
        defer_backward: bool = False,
        timeout: float | None = None,
        owns_service: bool = False,
    ) -> None:
        self._service, self._base_model, self._timeout = service, base_model, timeout
        self._sdk = sdk_of(service)
        self.capabilities = capabilities or self._sdk.plain
        self._remote = RemoteEngine(
            self._sdk, service, trainer, self.capabilities, defer_backward, timeout, owns_service
        )
        super().__init__(self._remote)

    @property
    def trainer(self) -> Any:
        """The SDK's ``TrainingClient``, for what is not one of our verbs."""
        return self._remote.trainer

    def reference(self) -> ReferenceModel:
        """Return a forward-only view of the base model."""
        with at_service("reference"):
            return self._sdk.reference(self._service, self._base_model, self.capabilities, self._timeout)
