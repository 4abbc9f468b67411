"""What the adapter of a model adds to the layers of its base, where that is a low-rank product and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from ....errors import UnsupportedError, require_extra
from ..models.adapters import active_adapter
from ..models.hf import HFModel

__all__ = ["LowRank", "low_rank"]


class LowRank(NamedTuple):
    """What is added to the output of a linear layer: ``scale * x A^T B^T``.

    Attributes:
        a: [r, in].
        b: [out, r].
        scale: factor on the product.
    """

    a: Tensor
    b: Tensor
    scale: float


def low_rank(model: HFModel, base: HFModel) -> Mapping[str, LowRank]:
    """Return what a model adds to its base, by the paths of the layers; nothing for the base itself.

    Args:
        model: the base with an adapter, around the same tensors.
        base: without an adapter.

    Raises:
        UnsupportedError: they differ in something else, or the adapter is of another kind.
    """
    if model is base:
        return {}
    if not model.is_lora:
        raise UnsupportedError("its weights are its own: it has no adapter")
    peft = require_extra("peft", "hf", "adapters of one batch")
    name, added = active_adapter(model.model), dict[str, LowRank]()
    for path, module in model.causal.named_modules():
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            added[path] = _product(peft, path, module, name)
    _require_nothing_else(model.causal, base.causal, added)
    return added


def _product(peft: Any, path: str, layer: Any, name: str) -> LowRank:
    plain = type(layer) is peft.tuners.lora.Linear and not getattr(layer, "lora_variant", {})
    if not plain or layer.merged or name not in layer.lora_A:
        raise UnsupportedError(f"its adapter is no low-rank product on {path} ({type(layer).__name__})")
    return LowRank(layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name]))


def _require_nothing_else(causal: Any, base: Any, added: Mapping[str, LowRank]) -> None:
    """Check that all other weights are the base's own, at the same places, and that the head has no adapter.

    Raises:
        UnsupportedError: they are not, or it has one.
    """
    head = causal.get_output_embeddings()
    if any(causal.get_submodule(path) is head for path in added):
        raise UnsupportedError("its adapter is on its output projection too")
    products = {id(tensor) for one in added.values() for tensor in (one.a, one.b)}
    own, shared = _parameters(causal), _parameters(base)
    for name, p in own.items():
        if id(p) not in products and shared.get(name.replace(".base_layer.", ".")) is not p:
            raise UnsupportedError(f"its {name} is not its base's")


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters(remove_duplicate=False))
