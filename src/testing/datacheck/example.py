"""A training example as a builder returned it, in one shape: tokens, and a weight for each of them as a target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, final

import torch

from ...datums.types import Datum
from ...errors import ConfigError, LengthError

__all__ = ["BuiltExample", "built_example"]

_IGNORED: Final = -100
_MASKS: Final = ("weights", "loss_weights", "loss_mask", "completion_mask", "assistant_masks", "assistant_mask", "mask")


@final
@dataclass(frozen=True)
class BuiltExample:
    """Tokens and weights of one example.

    Attributes:
        tokens: the whole text.
        weights: of each token as a target; the first is never one.
        inputs: what goes into the model.
        targets: what is predicted at each input; None: not trained there, so that it is not known.
    """

    tokens: tuple[int, ...]
    weights: tuple[float, ...]
    inputs: tuple[int, ...]
    targets: tuple[int | None, ...]

    @property
    def trained(self) -> tuple[bool, ...]:
        """Whether each token is trained."""
        return tuple(w != 0 for w in self.weights)


def built_example(returned: Any) -> BuiltExample:
    """Return what a builder returned in one shape.

    Args:
        returned: a `Datum`, or a mapping with ``input_ids`` and ``labels`` (which the model shifts) or a mask of the tokens;
            or a list of one of these.

    Raises:
        ConfigError: it is none of these.
        LengthError: tokens and weights differ in number.
    """
    if isinstance(returned, list | tuple) and len(returned) == 1:
        returned = returned[0]
    if isinstance(returned, Datum):
        return _of_datum(returned)
    if isinstance(returned, Mapping) and "input_ids" in returned:
        return _of_mapping(returned)
    raise ConfigError(
        f"a builder returns a Datum, or a mapping with input_ids and labels (or a mask), got {type(returned).__name__}"
    )


def _of_datum(datum: Datum) -> BuiltExample:
    inputs = datum.model_input.to_ints()
    given = datum.loss_fn_inputs
    targets = given["target_tokens"].tolist() if "target_tokens" in given else inputs[1:]
    weights = [float(w) for w in given["weights"].tolist()] if "weights" in given else [1.0] * len(targets)
    if len(weights) != len(targets):
        raise LengthError(f"{len(targets)} targets and {len(weights)} weights; give one weight per target")
    inputs = inputs[: len(targets)]
    return BuiltExample((*inputs, *targets[-1:]), (0.0, *weights), tuple(inputs), tuple(targets))


def _of_mapping(given: Mapping[str, Any]) -> BuiltExample:
    tokens = _row(given["input_ids"])
    name = next((key for key in ("labels", *_MASKS) if key in given), None)
    if name is None:
        raise ConfigError(f"a mapping needs labels or a mask ({', '.join(_MASKS)}), got {', '.join(given)}")
    row = _row(given[name])
    if len(row) != len(tokens):
        raise LengthError(f"{len(tokens)} input_ids and {len(row)} {name}; give one per token")
    ids = tuple(int(t) for t in tokens)
    if name != "labels":
        return BuiltExample(ids, tuple(map(float, row)), ids[:-1], ids[1:])
    weights = tuple(float(x != _IGNORED) for x in row)
    targets = tuple(None if x == _IGNORED else int(x) for x in row[1:])
    return BuiltExample(ids, weights, ids[:-1], targets)


def _row(values: Any) -> list[float]:
    flat: list[float] = torch.as_tensor(values).reshape(-1).tolist()
    return flat
