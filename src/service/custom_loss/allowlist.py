"""The operations that a custom loss may be made of: pure functions of tensors whose results are bounded by their inputs."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, Final

import torch

__all__ = ["ATTRIBUTES", "FIELDS", "FUNCTIONS", "METHODS"]

_OPERATORS: Final = "abs add and_ eq floordiv ge getitem gt invert le lt matmul mod mul ne neg or_ pos pow sub truediv"
_TENSOR: Final = """
abs acos add asin atan atan2 bitwise_and bitwise_not bitwise_or ceil clamp clamp_max clamp_min clip cos cosh div divide eq erf
erfc exp exp2 expm1 floor fmax fmin full_like ge greater gt isfinite isinf isnan le less lerp lgamma log log10 log1p log2
logaddexp logaddexp2 logical_and logical_not logical_or logical_xor logit lt masked_fill maximum minimum mul multiply nan_to_num
ne neg negative ones_like pow reciprocal relu round rsqrt sigmoid sign sin sinh sqrt square sub subtract tan tanh true_divide
trunc where xlogy zeros_like

all amax amin any argmax argmin argsort count_nonzero cumprod cumsum diff dot flip log_softmax logcumsumexp logsumexp max mean
median min nanmean nansum norm prod roll softmax sort std sum topk var

cat concat flatten gather index_select narrow permute reshape squeeze stack take_along_dim transpose unbind unsqueeze
"""
_METHODS: Final = "bool clone contiguous detach dim double float int long nelement numel size t to type_as view"
_FUNCTIONAL: Final = """
binary_cross_entropy binary_cross_entropy_with_logits elu gelu hinge_embedding_loss huber_loss leaky_relu log_softmax logsigmoid
mse_loss relu sigmoid silu smooth_l1_loss softmax softplus softsign tanh threshold
"""
_TRACED: Final = {  # as torch.fx calls functions that have another name where they are defined
    "torch.functional.norm": "torch.norm",
    "torch._C._nn.log_sigmoid": "torch.nn.functional.logsigmoid",
    "torch.nn.functional._threshold": "torch.nn.functional.threshold",
}
_MATH: Final = "ceil exp floor log log1p log2 pow sqrt tanh"


def _functions() -> dict[str, Callable[..., Any]]:
    table: dict[str, Callable[..., Any]] = {f"operator.{name}": getattr(operator, name) for name in _OPERATORS.split()}
    table |= {f"torch.{name}": getattr(torch, name) for name in _TENSOR.split() if hasattr(torch, name)}
    functional = torch.nn.functional
    table |= {f"torch.nn.functional.{name}": getattr(functional, name) for name in _FUNCTIONAL.split()}
    # Some functions of torch.nn.functional are built in, and are named after where they are from.
    table |= {f"torch._C._nn.{name}": getattr(functional, name) for name in _FUNCTIONAL.split()}
    table |= {traced: table[name] for traced, name in _TRACED.items()}
    return table | {f"math.{name}": getattr(math, name) for name in _MATH.split()}


FUNCTIONS: Final = _functions()
METHODS: Final = frozenset((_TENSOR + _METHODS).split())
ATTRIBUTES: Final = ("shape", "ndim", "dtype", "T")  # of a tensor
FIELDS: Final = ("values", "indices")  # of what max, sort and their like return
