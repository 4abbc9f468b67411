"""Flat config keys, as they travel in ``loss_fn_config``, and the fields of a loss that they stand for.

A field is a key of its own name, unless `keys` says of which keys a part of the loss, e.g. its clip range, is made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import Any, Final, TypeVar, cast, final

from ..errors import ConfigError, LossError, suggestion
from .aggregation import AGGREGATIONS, Aggregation

__all__ = ["config_keys", "from_wire", "keys", "to_wire", "unknown_field"]

_METADATA: Final = "keys"
Built = TypeVar("Built")


@final
@dataclass(frozen=True)
class _Keys:
    part: type
    attributes: Mapping[str, str]
    switch: str | None

    def defaults(self, default: Any) -> dict[str, Any]:
        """Return the default of each key; with a switch, that of the part that it switches on, and 0 or None for itself."""
        part = self.part() if self.switch else _coerced(self.part, default)
        found = {key: getattr(part, attribute) for key, attribute in self.attributes.items()}
        if self.switch:
            found[self.switch] = 0.0 if isinstance(found[self.switch], float) else None
        return found

    def build(self, given: Mapping[str, Any], default: Any) -> Any:
        """Return the part that some keys describe."""
        if self.switch and not given.get(self.switch):
            others = [f"{key}={value!r}" for key, value in given.items() if key != self.switch]
            if others:
                raise ConfigError(
                    f"{' and '.join(others)} {'has' if len(others) == 1 else 'have'} no effect without {self.switch}; "
                    "give it, or drop them"
                )
            return default
        values = {**self.defaults(default), **given}
        return self.part(**{attribute: values[key] for key, attribute in self.attributes.items()})


def keys(default: Any, part: type, *, switch: str | None = None, **attributes: str) -> Any:
    """Return a dataclass field that is made of several config keys.

    Args:
        default: of the field.
        part: the class of its value; ``part.of`` coerces a default that is something else.
        switch: the key that must be given, and not 0, for the part to exist at all.
        attributes: config key = attribute of the part.
    """
    return dataclasses.field(default=default, metadata={_METADATA: _Keys(part, attributes, switch)})


def config_keys(loss: type) -> dict[str, Any]:
    """Return the config keys of a loss class with their defaults."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(loss):
        part: _Keys | None = field.metadata.get(_METADATA)
        default = None if field.default is MISSING else field.default
        found |= {field.name: default} if part is None else part.defaults(default)
    return found


def unknown_field(loss: type, field: str) -> TypeError:
    """Return the error of a keyword that is no field of a loss, with what to write where it is a config key or part of one."""
    fields = [each for each in dataclasses.fields(loss) if each.init]
    names = [each.name for each in fields]
    meant = next((f" (did you mean {name!r}?)" for name in names if field.startswith(f"{name}_")), "")
    hints = [suggestion(field, names) or meant]
    for each in fields:
        part: _Keys | None = each.metadata.get(_METADATA)
        kind: Any = None if part is None else part.part
        if field in getattr(kind, "also_called", ()):
            hints.append(f"; write {each.name}={kind.written}")
        if part is not None and field in (*part.attributes, *part.attributes.values()):
            required = [x.name for x in dataclasses.fields(part.part) if x.default is MISSING]
            given = dict.fromkeys([*required, part.attributes.get(field, field)])
            hints.append(f"; write {each.name}={part.part.__name__}({', '.join(f'{x}=...' for x in given)})")
    if field in config_keys(loss):
        hints.append(f"; config keys go to get_loss({getattr(loss, 'name', '')!r}, {{{field!r}: ...}})")
    return TypeError(
        f"{loss.__name__} has no hyperparameter {field!r}{''.join(hints)}; it has: {', '.join(names) or 'none'}"
    )


def from_wire(loss: type[Built], config: Mapping[str, Any]) -> Built:
    """Build a loss from config keys.

    Raises:
        ConfigError: a key is unknown (close spellings are suggested), has no effect, or a value is out of range.
    """
    known = config_keys(loss)
    for key in config:
        if key not in known:
            name = getattr(loss, "name", loss.__name__)
            raise ConfigError(
                f"loss {name!r} has no config key {key!r}{suggestion(key, known)}; it has: {', '.join(known) or 'none'}"
            )
    arguments: dict[str, Any] = {}
    for field in dataclasses.fields(cast(Any, loss)):
        part: _Keys | None = field.metadata.get(_METADATA)
        if part is None:
            arguments |= {field.name: config[field.name]} if field.name in config else {}
            continue
        given = {key: config[key] for key in part.attributes if key in config}
        arguments |= {field.name: part.build(given, field.default)} if given else {}
    return loss(**arguments)


def to_wire(loss: Any) -> dict[str, Any] | None:
    """Return the keys that differ from the defaults, as numbers and strings; None where no such keys build this very loss."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(loss):
        part: _Keys | None = field.metadata.get(_METADATA)
        value = getattr(loss, field.name)
        if part is None:
            found[field.name] = _named(value)
        elif value is not None:
            found |= {key: getattr(value, attribute) for key, attribute in part.attributes.items()}
    defaults = {key: _named(default) for key, default in config_keys(type(loss)).items()}
    config = {key: value for key, value in found.items() if value != defaults[key]}
    if not all(value is None or isinstance(value, str | int | float) for value in config.values()):
        return None
    try:
        return config if from_wire(type(loss), config) == loss else None
    except (LossError, TypeError):  # what was acknowledged cannot be by a key
        return None


def _named(value: Any) -> Any:
    if isinstance(value, Aggregation):
        return value.name if AGGREGATIONS.get(value.name) == value else value
    return value


def _coerced(part: Any, default: Any) -> Any:
    return default if isinstance(default, part) else part.of(default)
