"""The output projection of a language model: what turns hidden states into logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Head", "head_weight", "require_causal", "require_linear", "require_whole_head", "unwrapped"]

_PEFT_WRAPPERS: Final = ("get_delta_weight", "modules_to_save", "token_adapter")
_TRAINER_WRAPPERS: Final = ("module", "_orig_mod")  # of data parallelism, and of torch.compile


class Head(NamedTuple):
    """The output projection: ``logits = softcap * tanh((scale * h @ W^T + bias) / softcap)``.

    Attributes:
        weight: [V, H].
        bias: [V], or None.
        softcap: bound on the logits, or None.
        scale: factor on the product.
        group: the processes that have the other rows, where this one has only some; None: these are all.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0
    group: ProcessGroup | None = None

    @property
    def trainable(self) -> bool:
        """Whether weight or bias has a gradient."""
        return self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)

    @classmethod
    def of(cls, model: Any) -> Head:
        """Return the output projection of a transformers model, with the scale and the softcap of its config.

        Args:
            model: a causal language model; peft, data parallelism or ``torch.compile`` may have wrapped it.

        Returns:
            The head, its parameters live (not copies); with an adapter on it, the sum, differentiable.

        Raises:
            UnsupportedError: it is no such model, or its head is no matrix, or trains more than that and a bias.
        """
        causal = unwrapped(model)
        output = causal.get_output_embeddings()
        require_linear(output)
        _require_no_others(output)
        weight, bias = head_weight(output)
        if weight.dim() != 2 or not weight.is_floating_point():
            raise UnsupportedError(
                f"the head's weight is {weight.dtype} {list(weight.shape)}, not a matrix of floats: quantized, or kept in "
                "parts by a trainer that shards it; leave the head whole and unquantized"
            )
        config = causal.config.get_text_config()
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        return cls(weight, bias, getattr(config, "final_logit_softcapping", None), scale)


def require_whole_head(head: Head) -> None:
    """Check that all rows of a head are here.

    Raises:
        UnsupportedError: others are on other processes.
    """
    if head.group is not None:
        raise UnsupportedError(
            f"this process has {len(head.weight)} rows of the head, and others have the rest: score with "
            "own_positions_logprobs on all of them, or make the backend with vocab_parallel=False"
        )


def unwrapped(model: Any) -> Any:
    """Return the model with ``get_output_embeddings`` inside of what trainers wrap around it.

    Raises:
        UnsupportedError: there is none.
    """
    inner = model
    while not hasattr(inner, "get_output_embeddings"):
        names = [name for name in _TRAINER_WRAPPERS if isinstance(getattr(inner, name, None), nn.Module)]
        if not names:
            raise UnsupportedError(
                f"{type(model).__name__} is no causal language model of transformers: it has no get_output_embeddings(); for a "
                "model of your own, give selected_logprobs its hidden states and Head(weight)"
            )
        inner = getattr(inner, names[0])
    return inner


def require_causal(model: Any) -> None:
    """Check that a transformers model scores each token by the tokens before it, at the position before it.

    Raises:
        UnsupportedError: it has an encoder, whose decoder's labels stand at its own positions, or it fills in masked tokens.
    """
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"{name} has an encoder and a decoder: its labels belong to the decoder's inputs, and not to input_ids; give "
            "selected_logprobs the decoder's hidden states, Head.of(model) and the labels, which are not shifted there"
        )
    if "MaskedLM" in name:
        raise UnsupportedError(f"{name} reads the tokens that it scores; use a causal language model")


def require_linear(output: Any) -> None:
    """Check that an output projection is a linear layer, or one that peft wraps in a way that `head_weight` knows.

    Raises:
        UnsupportedError: it is something else.
    """
    if not (isinstance(output, nn.Linear) or any(hasattr(output, name) for name in _PEFT_WRAPPERS)):
        raise UnsupportedError(
            f"the head is a {type(output).__module__}.{type(output).__name__}, not a linear layer or one with a matrix added; "
            "leave it out of the adapter's target_modules"
        )


def _require_no_others(output: nn.Module) -> None:
    """Check that a linear layer trains nothing but its weight and its bias, or what they are made of.

    Raises:
        UnsupportedError: it does, a scale for each token for example, which would get no gradient.
    """
    own = {"weight", "bias"}  # a parametrization makes them of others
    linear = [layer for layer in output.modules() if isinstance(layer, nn.Linear) and own <= layer._parameters.keys()]
    trained = {n for layer in linear for n, p in layer.named_parameters(recurse=False) if p.requires_grad}
    if others := sorted(trained - own):
        raise UnsupportedError(
            f"the head, a {type(output).__name__}, trains {', '.join(others)} beside its weight and its bias, which would get "
            "no gradient: freeze it, or give selected_logprobs the hidden states and a Head whose weight is made with it"
        )


def head_weight(output: Any) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of an output projection as its adapter leaves them, differentiably.

    Args:
        output: a linear layer; or one that peft wraps, to add a matrix to it, to train a copy, or to train some rows.

    Raises:
        UnsupportedError: an adapter does more than add a matrix.
    """
    active = [] if getattr(output, "disable_adapters", False) else getattr(output, "active_adapters", [])
    if hasattr(output, "modules_to_save"):
        output = output.modules_to_save[active[0]] if active else output.original_module
        return output.weight, output.bias
    if hasattr(output, "token_adapter"):
        base = output.token_adapter.get_base_layer()
        return (output.token_adapter.get_merged_weights(active) if active else base.weight), base.bias
    if not hasattr(output, "get_delta_weight"):
        return output.weight, output.bias
    base = output.get_base_layer()
    # A sum in bfloat16 would be the weight itself until an adapter has changed it by one part in 512. Switched off, it is the
    # reference, whose products are made as the policy's.
    weight: Tensor = base.weight.to(torch.promote_types(base.weight.dtype, torch.float32))
    merged = getattr(output, "merged_adapters", ())  # are in the base's weight already
    for name in active:
        if name not in merged and any(name in getattr(output, part, ()) for part in output.adapter_layer_names):
            _require_matrix(output, name)
            weight = weight + output.get_delta_weight(name).to(weight.dtype)
    return weight, base.bias


def _require_matrix(output: Any, name: str) -> None:
    """Check that an adapter on the head adds a matrix, now and after its first step, and nothing else.

    Raises:
        UnsupportedError: it scales the sum (DoRA), adds a bias, or drops out.
    """
    what = None
    if name in getattr(output, "lora_variant", {}):
        what = f"a {type(output.lora_variant[name]).__name__}"
    elif getattr(output, "lora_bias", {}).get(name):
        what = "lora_bias=True"
    elif output.training and any(_dropouts(output, name)):
        what = "a dropout"
    if what is not None:
        raise UnsupportedError(
            f"the adapter {name!r} on the head has {what}, and log-probs are computed from the head's weight and a matrix that "
            "is added: leave that out, or the head out of the adapter's target_modules"
        )


def _dropouts(output: Any, name: str) -> Iterator[float]:
    """Yield the probabilities of an adapter's kinds of dropout, as modules or numbers, whatever peft calls them."""
    for part, by_adapter in (*vars(output).items(), *output.named_children()):
        if part.endswith("dropout") and name in by_adapter:
            found = by_adapter[name]
            yield float(getattr(found, "p", 0.0) if isinstance(found, nn.Module) else found)
