"""What differs between the SDKs by which a service is reached; all else of this folder knows none of them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol, final

from ....datums.convert import to_fireworks, to_tinker
from ....datums.types import Datum, ModelInput
from ....errors import ConfigError, UnsupportedError, require_extra
from ...types import AdamParams, SamplingParams
from ..capabilities import Capabilities
from .convert import ready
from .reference import BaseScorer, SamplerScorer, TrainerScorer

__all__ = ["FireworksSdk", "Sdk", "TinkerSdk", "sdk_named", "sdk_of"]

_ADAM: Final = ("learning_rate", "beta1", "beta2", "eps", "weight_decay", "grad_clip_norm")
_LOADABLE: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


class Sdk(Protocol):
    """One client library, for one backend.

    Attributes:
        name: of the SDK, and of the extra that installs it.
        plain: what a service can do by itself that says no more than that it speaks this SDK's protocol.
        normalizes: it can ask for a normalisation where the service has one.
        sends_divisor: it can ask for a division by a number.
    """

    name: str
    plain: Capabilities

    @property
    def normalizes(self) -> bool: ...

    @property
    def sends_divisor(self) -> bool: ...

    def key(self, api_key: str | None) -> str:
        """Return the key that the SDK would send."""
        ...

    def connect(self, url: str, api_key: str | None) -> Any:
        """Return the SDK's client of a service."""
        ...

    def close(self, service: Any, trainer: Any) -> None:
        """Give back what was made at the service, and close the client."""
        ...

    def datums(self, data: Sequence[Datum]) -> list[Any]:
        """Return datums as the SDK's."""
        ...

    def step(self, trainer: Any, params: AdamParams, mode: str | float | None) -> Any:
        """Begin an optimizer step; with ``mode`` (``none`` included) where the service divides."""
        ...

    def save(self, trainer: Any, name: str, overwrite: bool) -> Any:
        """Begin to save weights and optimizer."""
        ...

    def load(self, service: Any, trainer: Any, path: str, optimizer: bool, timeout: float | None) -> Any:
        """Return a training client with the weights of a checkpoint."""
        ...

    def reference(self, service: Any, base_model: str, can: Capabilities, timeout: float | None) -> BaseScorer:
        """Return what scores with the frozen base model of a service that can do this."""
        ...

    def sampler(self, trainer: Any, timeout: float | None) -> Any:
        """Return a sampling client on the present weights."""
        ...

    def sample(self, sampler: Any, prompt: ModelInput, n: int, params: SamplingParams) -> Any:
        """Begin to draw completions of one prompt."""
        ...


@final
class TinkerSdk:
    """The official SDK (extra ``remote``)."""

    name = "tinker"
    plain = Capabilities()

    def __init__(self) -> None:
        self._base: Any = None

    @property
    def _types(self) -> Any:
        return require_extra("tinker", "remote", "RemoteBackend")

    def key(self, api_key: str | None) -> str:
        return api_key or os.environ.get("TINKER_API_KEY", "")

    def connect(self, url: str, api_key: str | None) -> Any:
        return self._types.ServiceClient(base_url=url, api_key=api_key)

    def close(self, service: Any, trainer: Any) -> None:
        if hasattr(service, "__exit__"):
            service.__exit__(None, None, None)  # ends the session, and waits for it
        else:  # releases before sessions had an end
            service.holder.close()

    def datums(self, data: Sequence[Datum]) -> list[Any]:
        return to_tinker(data)

    @property
    def normalizes(self) -> bool:
        """Releases since there is more than one optimizer pass on parameters that they do not know."""
        return self._open_params is not None

    @property
    def sends_divisor(self) -> bool:
        return self.normalizes

    @property
    def _open_params(self) -> Any:
        """The SDK's parameters of any optimizer; None in releases that know one optimizer only."""
        optimizers = getattr(self._types.types, "optimizer", None)
        return getattr(optimizers, "OptimParamsBase", None)

    def step(self, trainer: Any, params: AdamParams, mode: str | float | None) -> Any:
        given = {name: getattr(params, name) for name in _ADAM}
        if mode is None:
            return trainer.optim_step(self._types.AdamParams(**given))
        return trainer.optim_step(self._open_params(type="adamw", **given, grad_accumulation_normalization=mode))

    def save(self, trainer: Any, name: str, overwrite: bool) -> Any:
        return trainer.save_state(name, **({"overwrite": True} if overwrite else {}))

    def load(self, service: Any, trainer: Any, path: str, optimizer: bool, timeout: float | None) -> Any:
        created = "create_training_client_from_state" + ("_with_optimizer" if optimizer else "")
        return ready(getattr(service, created)(path), timeout)

    def reference(self, service: Any, base_model: str, can: Capabilities, timeout: float | None) -> BaseScorer:
        if can.starts_at_base:
            self._base = self._base or ready(service.create_lora_training_client(base_model, rank=1), timeout)
            return TrainerScorer(self._base, self.datums, timeout)
        sampler = ready(service.create_sampling_client(base_model=base_model), timeout)
        return SamplerScorer(sampler, self._types.ModelInput, timeout)

    def sampler(self, trainer: Any, timeout: float | None) -> Any:
        return ready(trainer.save_weights_and_get_sampling_client(), timeout)

    def sample(self, sampler: Any, prompt: ModelInput, n: int, params: SamplingParams) -> Any:
        given = self._types.SamplingParams(
            max_tokens=params.max_tokens,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            seed=params.seed,
            stop=None if params.stop is None else list(params.stop),
        )
        return sampler.sample(self._types.ModelInput.from_ints(prompt.to_ints()), n, given)


@final
class FireworksSdk:
    """Fireworks' training SDK (extra ``fireworks``), a fork with its own optimizer step, checkpoints and samplers."""

    name = "fireworks"
    plain = Capabilities(losses=frozenset({"cross_entropy"}), normalizes=True)
    normalizes = True
    sends_divisor = False  # its field has names only

    def __init__(self) -> None:
        self._base: Any = None

    @property
    def _types(self) -> Any:
        return require_extra("fireworks.training.sdk", "fireworks", "RemoteBackend on Fireworks' SDK")

    def key(self, api_key: str | None) -> str:
        return api_key or os.environ.get("FIREWORKS_API_KEY", "")

    def connect(self, url: str, api_key: str | None) -> Any:
        return self._types.ServiceClient(base_url=url, api_key=api_key)

    def close(self, service: Any, trainer: Any) -> None:
        try:
            for client in filter(None, (trainer, self._base)):  # this SDK's sessions do not end
                client.unload_model().result()
        finally:
            service.close()

    def datums(self, data: Sequence[Datum]) -> list[Any]:
        return to_fireworks(data)

    def step(self, trainer: Any, params: AdamParams, mode: str | float | None) -> Any:
        asked = {} if mode is None else {"grad_accumulation_normalization": mode}
        return trainer.optim_step(self._types.AdamParams(**{name: getattr(params, name) for name in _ADAM}), **asked)

    def save(self, trainer: Any, name: str, overwrite: bool) -> Any:
        if not _LOADABLE.fullmatch(name):
            raise ConfigError(
                f"save_state({name!r}): Fireworks' SDK saves under this name but refuses to load it; use lower-case letters, "
                "digits and inner hyphens, 63 at most"
            )
        if overwrite:
            raise UnsupportedError("save_state(overwrite=True): Fireworks' SDK has no such thing; choose another name")
        return trainer.save_state(name)

    def load(self, service: Any, trainer: Any, path: str, optimizer: bool, timeout: float | None) -> Any:
        ready(trainer.load_state_with_optimizer(path) if optimizer else trainer.load_state(path), timeout)
        return trainer

    def reference(self, service: Any, base_model: str, can: Capabilities, timeout: float | None) -> BaseScorer:
        self._base = self._base or service.create_base_training_client(base_model)
        return TrainerScorer(self._base, self.datums, timeout)

    def sampler(self, trainer: Any, timeout: float | None) -> Any:
        raise UnsupportedError(
            "sample: Fireworks' SDK samples from an inference deployment, not from the training service; use its "
            "DeploymentSampler, or connect(..., sdk='tinker') where the service speaks that too"
        )

    def sample(self, sampler: Any, prompt: ModelInput, n: int, params: SamplingParams) -> Any:
        return self.sampler(None, None)


_SDKS: Final[dict[str, Callable[[], Sdk]]] = {"tinker": TinkerSdk, "fireworks": FireworksSdk}


def sdk_named(name: str) -> Sdk:
    """Return an SDK.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in _SDKS:
        raise ConfigError(f"sdk must be one of {sorted(_SDKS)}, got {name!r}")
    return _SDKS[name]()


def sdk_of(service: Any) -> Sdk:
    """Return the SDK that a service client is of; one of no SDK that is known is taken to be like the official one."""
    return _SDKS["fireworks" if type(service).__module__.split(".")[0] == "fireworks" else "tinker"]()
