"""Which linear layers a transformers model has, what an adapter is on, and what of the model is left as it is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, final

from torch import nn

from .facts.quantized import weight_count

__all__ = ["LLAMA", "Coverage", "LayerNames", "coverage", "layer_ends", "layer_names", "linear_layers"]

_SENSES: Final = re.compile(r"vision|visual|audio|speech|image|multi_?modal|mm_")  # parts that no text runs through
_MIXES_TOKENS: Final = re.compile(r"attn|attention|mixer|mamba|conv|recurrent|rnn|temporal")


class LayerNames(NamedTuple):
    """Names of linear layers, or the ends of their paths, as peft's ``target_modules`` has them.

    Attributes:
        attention: whatever mixes tokens.
        mlp: all others but the head.
        unembed: the output projection.
    """

    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    unembed: tuple[str, ...]


LLAMA: Final = LayerNames(("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj"), ("lm_head",))


def layer_names(model: Any) -> LayerNames:
    """Return the names of a model's linear layers; those of Llama where it has no others.

    Layers of a vision or audio part are in none: a text does not run through them.

    Args:
        model: of transformers, without an adapter.
    """
    linear = dict(linear_layers(model))
    head = _path_of(model, model.get_output_embeddings())
    text = [path for path in linear if path != head and not _SENSES.search(path)]
    if len(text) + (head in linear) == len(linear) and {p.rpartition(".")[2] for p in text} <= {*LLAMA[0], *LLAMA[1]}:
        return LLAMA._replace(unembed=(head.rpartition(".")[2],)) if head else LLAMA
    mixing = [path for path in text if _MIXES_TOKENS.search(path)]
    other = [path for path in text if not _MIXES_TOKENS.search(path)]
    return LayerNames(layer_ends(mixing, linear), layer_ends(other, linear), (head,) if head else ())


@final
@dataclass(frozen=True)
class Coverage:
    """What of a model is trained.

    Attributes:
        trained, total: numbers of weights.
        adapted: the layers that an adapter is on, by the ends of their paths.
        left_out: linear layers and experts that it is not on, by kind, with how many weights they have.
    """

    trained: int
    total: int
    adapted: tuple[str, ...]
    left_out: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        share = f"{self.trained:,} of {self.total:,} weights are trained ({self.trained / max(1, self.total):.2%})"
        on = f"; adapters on {', '.join(self.adapted)}" if self.adapted else ""
        off = f"; none on {', '.join(f'{kind} ({size:,} weights)' for kind, size in self.left_out)}"
        return share + on + (off if self.left_out else "")


def coverage(model: Any) -> Coverage:
    """Return what an adapter is on and what not.

    Args:
        model: of transformers, plain or wrapped by peft.
    """
    parameters = list(model.parameters())
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    wrapped = [path for path, module in causal.named_modules() if _is_adapted(module)]
    inside = tuple(f"{path}." for path in wrapped)
    left: dict[str, int] = {}
    for kind, path, size in _candidates(causal):
        if path not in wrapped and not path.startswith(inside):
            left[kind] = left.get(kind, 0) + size
    return Coverage(
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        total=sum(weight_count(p) for p in parameters),
        adapted=tuple(sorted({_end(path.replace(".base_layer", "")) for path in wrapped})),
        left_out=tuple(left.items()) if wrapped else (),
    )


def _candidates(causal: Any) -> Iterator[tuple[str, str, int]]:
    """Yield kind, path and number of weights of all that an adapter could be thought to be on."""
    head = _path_of(causal, causal.get_output_embeddings())
    for path, module in linear_layers(causal):
        size = sum(weight_count(p) for p in module.parameters())
        if path == head:
            yield "the output projection", path, size
        elif _SENSES.search(path):
            yield "a part that no text runs through", path, size
        else:
            yield _end(path), path, size
    for path, p in causal.named_parameters():
        if p.dim() == 3 and "expert" in path:
            yield "fused experts", path, p.numel()


def linear_layers(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yield the linear layers of a transformers model by their paths."""
    from transformers.pytorch_utils import Conv1D

    for path, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            yield path, module


def _is_adapted(module: nn.Module) -> bool:
    return hasattr(module, "get_base_layer") or hasattr(module, "modules_to_save")


def _path_of(model: nn.Module, wanted: Any) -> str:
    return next((path for path, module in model.named_modules() if module is wanted), "")


def _end(path: str) -> str:
    """The last two parts of a path; one where the other is the number of a layer."""
    *_, before, last = ("", *path.split("."))
    return last if before.isdigit() or not before else f"{before}.{last}"


def layer_ends(paths: list[str], linear: dict[str, nn.Module]) -> tuple[str, ...]:
    """Return the ends of paths; whole paths where an end is that of another layer too."""
    own, chosen = set(paths), dict[str, None]()
    for path in paths:
        end = _end(path)
        shared = any(other not in own and (other == end or other.endswith(f".{end}")) for other in linear)
        chosen[path if shared else end] = None
    return tuple(chosen)
