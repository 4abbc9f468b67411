"""RemoteBackend: the protocol on a service that speaks the Tinker training API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, final

from ...datums.types import Datum
from ...errors import ConfigError, RemoteError
from ..base import Backend
from ..calls.losses import loss_name
from ..engine import Call
from ..operations.futures import Answer, Future
from ..operations.runner import sized
from ..protocol import ReferenceModel
from ..reference import ReferenceView
from ..types import ForwardBackwardOutput
from .capabilities import Capabilities
from .connection.liveness import Liveness
from .connection.probe import unload
from .engine import RemoteEngine
from .sdk.error_mapping import at_service
from .sdk.sdks import sdk_of

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
        url: address of the service, which is asked whether it is still there when an answer is late; default: what the
            SDK's client says.
        api_key: for a service of ours at that address, which is then told of models that a load has replaced.
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
        url: str | None = None,
        api_key: str | None = None,
    ) -> None:
        self._service, self._base_model, self._timeout = service, base_model, timeout
        self._sdk = sdk_of(service)
        self._liveness = Liveness(url or getattr(service, "_base_url", None))
        self.capabilities = capabilities or self._sdk.plain
        self._remote = RemoteEngine(
            self._sdk,
            service,
            trainer,
            self.capabilities,
            defer_backward,
            timeout,
            owns_service,
            self._liveness,
            lambda: self._accumulation.ledger,
            partial(unload, url, api_key) if url and api_key and self.capabilities.divides else None,
        )
        super().__init__(self._remote)

    @property
    def trainer(self) -> Any:
        """The SDK's ``TrainingClient``, for what is not one of our verbs."""
        return self._remote.trainer

    def reference(self) -> ReferenceModel:
        """Return a forward-only view of the base model, which gives log-probs and evaluates no loss."""
        self._operations.require_open("reference")
        with at_service("reference"), self._liveness.explaining("reference", self._timeout):
            base = self._sdk.reference(self._service, self._base_model, self.capabilities, self._timeout)

        def forward(
            data: Sequence[Datum], loss_fn: str, config: Mapping[str, Any] | None
        ) -> Future[ForwardBackwardOutput]:
            def work() -> Answer[ForwardBackwardOutput]:
                if loss_fn != "cross_entropy" or config:
                    raise ConfigError(
                        f"the reference of a service gives log-probs only; drop loss_fn={loss_fn!r} and its config"
                    )
                call = self._prepare(data, None)
                with at_service("reference"):
                    return base.score(call.data).map(lambda logprobs: ForwardBackwardOutput.of(logprobs, {}))

            return self._run(Call("reference", loss_name(loss_fn), sized(data)), work)

        return ReferenceView(forward)

    def close(self, timeout: float | None = None) -> None:
        """Refuse what follows, wait for what is under way, and end the session; see `Backend.close`.

        Args:
            timeout: seconds for all of it; None = the backend's, or else as long as the service answers, and a minute for the
                session's end: a service that has been silent for 10 seconds is not waited for.

        Raises:
            UnretrievedFailureError: an operation failed and nobody retrieved its error.
            RemoteError: the service did not answer in time; nothing here is held any more.
        """
        self._liveness.closing = True
        try:
            self._operations.close(self._timeout if timeout is None else timeout)
        except TimeoutError as error:
            raise RemoteError(f"close: {error}") from error
