"""The backends that a command names: ``fake``, ``native:MODEL`` or ``remote:URL``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, final

from ...backends import Backend, FakeBackend, TorchBackend, connect
from ...backends.native import HFModel
from ...backends.native.models.lora import LoraChoice
from ...errors import ConfigError
from ...service.served.registry import Base
from .models import MODEL_HELP, load_named

__all__ = ["BACKEND_HELP", "NamedBackend", "model_of", "open_backend"]

BACKEND_HELP: Final = f"fake, native:MODEL or remote:URL; MODEL is {MODEL_HELP}"


@final
@dataclass(frozen=True, eq=False)
class NamedBackend:
    """A backend that was opened by name.

    Attributes:
        name: as the user gave it.
        backend: itself.
        tokenizer: of its model; None if there is none.
        vocab_size: of its model; None = not known.
    """

    name: str
    backend: Backend
    tokenizer: Any = None
    vocab_size: int | None = None


def open_backend(
    name: str, *, dtype: str = "float32", rank: int | None = None, seed: int = 0, base_model: str | None = None
) -> NamedBackend:
    """Open a backend.

    Args:
        name: ``fake``, ``native:MODEL`` or ``remote:URL``.
        dtype: of the weights of a native model.
        rank: of the adapter; None: a native model is trained whole.
        seed: of the adapter, which is then the one that our service makes of this rank and seed.
        base_model: at a service.

    Raises:
        ConfigError: the name is none of these, or a service is not told which model.
        RemoteError: the service cannot be reached, or refuses the model.
    """
    kind, _, rest = name.partition(":")
    if kind == "native" and rest:
        return _native(name, rest, dtype, None if rank is None else LoraChoice(rank, seed))
    if kind == "remote" and rest:
        if base_model is None:
            raise ConfigError(f"{name}: say which model it serves by --base-model")
        chosen = LoraChoice.rank if rank is None else rank
        return NamedBackend(name, connect(rest, base_model=base_model, rank=chosen, lora={"seed": seed}))
    if name == "fake":
        fake = FakeBackend(seed=seed)
        return NamedBackend(name, fake, vocab_size=fake.vocab_size)
    raise ConfigError(f"a backend is {BACKEND_HELP}; got {name!r}")


def model_of(name: str) -> str | None:
    """Return the model that ``native:MODEL`` names, None for other backends."""
    kind, _, model = name.partition(":")
    return model if kind == "native" and model else None


def _native(name: str, model: str, dtype: str, lora: LoraChoice | None) -> NamedBackend:
    loaded = load_named(model, dtype=dtype)
    adapted = HFModel(loaded.model) if lora is None else Base(model, loaded.model).adapted(lora)
    backend = TorchBackend(adapted, tokenizer=loaded.tokenizer)
    return NamedBackend(name, backend, loaded.tokenizer, backend.vocab_size)
