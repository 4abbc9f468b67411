"""Losses by name: a small registry object and one default instance."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final, TypeVar, final

from ..errors import ConfigError, DuplicateLossError, UnknownLossError, suggestion
from .base import Loss
from .config import to_wire
from .declaration import require_declaration
from .kind import check_declared

__all__ = ["ENTRY_POINT_GROUP", "Registry", "config_of", "get_loss", "loss_names", "register", "registry"]

ENTRY_POINT_GROUP: Final = "pullback.losses"
REFUSED: Final = {
    "stable_reinforce": "its formula is not public; use importance_sampling, ppo or cispo, with a Correction where needed",
}
LossClass = TypeVar("LossClass", bound=type[Loss])


@final
class Registry:
    """Loss classes by name.

    Those of installed packages (entry-point group ``pullback.losses``) are loaded when a name is asked for that is not
    known, or when all names are.
    """

    def __init__(self, group: str | None = None) -> None:
        self._classes: dict[str, type[Loss]] = {}
        self._group = group

    def register(self, loss: LossClass) -> LossClass:
        """Add a loss class under its ``name`` and return it unchanged, so it serves as a decorator too.

        A class of ``__main__`` takes the place of the one that it was before: a cell of a notebook may run again.

        Raises:
            DuplicateLossError: another class has that name.
            ConfigError: it is no class of losses, lacks a part, declares an input that does not exist, or the gradient of a
                token depends on more than it declares; see `pullback.losses.declaration` and `kind`.
        """
        known = self._classes.get(getattr(loss, "name", ""))
        if known is not None and _is_cell_again(known, loss):
            known = None
        if known is not None and known is not loss:
            raise DuplicateLossError(
                f"the name {loss.name!r} belongs to {known.__module__}.{known.__qualname__}; choose another"
            )
        if known is None:
            require_declaration(loss)
            check_declared(loss)
        self._classes[loss.name] = loss
        return loss

    def get(self, name: str) -> type[Loss]:
        """Return the class of that name.

        Raises:
            UnknownLossError: none is registered; the message lists those that are, or says why the name is refused.
            DuplicateLossError, ConfigError: an installed package has a loss that cannot be had; see `names`.
        """
        if name not in self._classes:
            self._load_plugins()
        if name not in self._classes and name in REFUSED:
            raise UnknownLossError(f"loss {name!r} is known but not provided: {REFUSED[name]}")
        if name not in self._classes:
            raise UnknownLossError(
                f"unknown loss {name!r}{suggestion(name, self._classes)}; known: {', '.join(sorted(self._classes))}"
            )
        return self._classes[name]

    def build(self, name: str, config: Mapping[str, Any] | None = None) -> Loss:
        """Return the loss of that name with ``config`` as its hyperparameters.

        Raises:
            UnknownLossError: the name is unknown.
            ConfigError: a key is unknown (close spellings are suggested) or a value is out of range.
        """
        return self.get(name).from_config(**dict(config or {}))

    def names(self) -> tuple[str, ...]:
        """Return the registered names, those of installed packages too, sorted.

        Raises:
            DuplicateLossError: an installed package has a loss of a name that is taken.
            ConfigError: one cannot be loaded, is no `Loss`, or has another name than its entry point.
        """
        self._load_plugins()
        return tuple(sorted(self._classes))

    def _load_plugins(self) -> None:
        if self._group is None:
            return
        for entry in entry_points(group=self._group):
            self._add(entry)
        self._group = None  # not before all are there: a package that fails does so every time

    def _add(self, entry: EntryPoint) -> None:
        package = entry.dist.name if entry.dist is not None else "an unknown package"
        place = f"the entry point {entry.name!r} of {package} ({entry.value})"
        try:
            loss = entry.load()
        except Exception as error:
            raise ConfigError(f"{place} cannot be loaded: {type(error).__name__}: {error}") from error
        if not (isinstance(loss, type) and issubclass(loss, Loss)):
            raise ConfigError(f"{place} is no Loss class, but {loss!r}")
        if loss.name != entry.name:
            raise ConfigError(f"{place} is a loss called {loss.name!r}: give the entry point that name")
        try:
            self.register(loss)
        except DuplicateLossError as error:
            raise DuplicateLossError(f"{place}: {error}, or uninstall {package}") from error
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from error


def _is_cell_again(known: type, loss: type) -> bool:
    return known.__module__ == loss.__module__ == "__main__" and known.__qualname__ == loss.__qualname__


def config_of(loss: Loss) -> dict[str, Any] | None:
    """Return the flat config that builds this very loss by its name; None if a hyperparameter has no key, or it has no name."""
    return to_wire(loss) if registry._classes.get(loss.name) is type(loss) else None


registry: Final = Registry(ENTRY_POINT_GROUP)


def register(loss: LossClass) -> LossClass:
    """Add a loss class to the default registry; see `Registry.register`."""
    return registry.register(loss)


def get_loss(name: str, config: Mapping[str, Any] | None = None) -> Loss:
    """Build a loss of the default registry; see `Registry.build`."""
    return registry.build(name, config)


def loss_names() -> tuple[str, ...]:
    """Return the names in the default registry, sorted; see `Registry.names`."""
    return registry.names()
