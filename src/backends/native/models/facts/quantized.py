"""Models whose weights are quantised (bitsandbytes, torchao): what of them can be trained, and what they are made of."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .....errors import UnsupportedError

__all__ = [
    "is_quantized",
    "plain_tensors",
    "require_adapter",
    "require_plain_head",
    "require_weights_only",
    "weight_count",
]


def is_quantized(model: Any) -> bool:
    """Whether transformers has loaded a model with quantised weights."""
    return bool(getattr(model, "is_quantized", False))


def require_adapter(model: nn.Module) -> None:
    """Check that somebody has chosen what is trained of a quantised model: an adapter, or some of its weights.

    Raises:
        UnsupportedError: only what happens not to be quantised would be trained.
    """
    plain = [p for p in model.parameters() if not _holds_codes(p)]
    if is_quantized(model) and all(p.requires_grad for p in plain):
        raise UnsupportedError(
            "the weights of this model are quantized and cannot be trained themselves: pass lora=<rank>, or load it without "
            "its quantization_config; to train what is not quantized, freeze the rest"
        )


def require_weights_only(model: nn.Module) -> None:
    """Check that a model's activations are not quantised with its weights.

    Raises:
        UnsupportedError: they are, so that log-probs depend on what else is in a forward.
    """
    settings: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    if is_quantized(model) and getattr(settings, "load_in_8bit", False) and settings.llm_int8_threshold:
        raise UnsupportedError(
            f"LLM.int8() with llm_int8_threshold={settings.llm_int8_threshold:g} rounds a token by what the other tokens of "
            "its forward are, later ones too: quantize with llm_int8_threshold=0.0, or in 4 bits"
        )
    rounding = [n for n, p in model.named_parameters() if getattr(p, "act_quant_kwargs", None) is not None]
    if rounding:
        raise UnsupportedError(
            f"activations are quantized before {rounding[0]}, by steps so coarse that the last bit of a sum, which differs "
            "from batch to batch, changes log-probs: quantize weights alone, e.g. Int8WeightOnlyConfig"
        )


def require_plain_head(model: nn.Module, head: Any) -> None:
    """Check that the output projection has a weight that log-probs can be computed from.

    Args:
        model: of transformers.
        head: its output projection, with an adapter or without.

    Raises:
        UnsupportedError: it is quantised.
    """
    base = head.get_base_layer() if hasattr(head, "get_base_layer") else head
    weight = getattr(base, "weight", None)
    if is_quantized(model) and isinstance(weight, Tensor) and _holds_codes(weight):
        raise UnsupportedError(
            f"the head of {type(model).__name__} is quantized ({type(weight).__name__}), and log-probs are computed from its "
            "weights: quantize all but the head (modules_to_not_convert or llm_int8_skip_modules=['lm_head'])"
        )


def weight_count(parameter: Tensor) -> int:
    """Return how many weights a parameter stands for; one of 4 bits holds two of them in each of its bytes."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else prod(state.shape)


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """Yield a tensor, or the tensors that it is made of, as torchao's are of codes and scales."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from plain_tensors(getattr(tensor, name))


def sampled_numbers(tensor: Tensor) -> Iterator[Tensor]:
    """Yield at most 64 numbers, evenly spread, of each of the tensors that a tensor is made of: to tell models apart."""
    for plain in plain_tensors(tensor):
        yield plain.reshape(-1)[:: max(1, plain.numel() // 64)][:64]


def _holds_codes(weight: Tensor) -> bool:
    """Whether a weight is one of codes: of whole numbers, as bitsandbytes has them, or made of some, as torchao has them."""
    return any(not one.is_floating_point() or one.element_size() == 1 for one in plain_tensors(weight))
