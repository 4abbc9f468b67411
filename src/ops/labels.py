"""Log-probs of a trainer's labels: from its model without the logits of all tokens, or from logits that it has already."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any, Final, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..errors import ConfigError, ShapeError, UnsupportedError
from .head import Head, head_weight, require_causal, unwrapped
from .logprobs import gathered, selected_logprobs
from .own_logits import distance_to_own, large_at_the_last

__all__ = ["logprobs_from_logits", "logprobs_of"]

_IGNORED: Final = -100
_TOLERANCE: Final = {torch.float64: 1e-6, torch.float32: 1e-4}  # of one position's logits
_OWN_INPUTS: Final = {"logits_to_keep", "num_logits_to_keep"}
_HALF: Final = (torch.bfloat16, torch.float16)
_HALF_TOLERANCE: Final = 0.02


class _Compared(NamedTuple):
    """What was compared of a model: the layer of its head, the scale and the bound of its config; and the scale that fits."""

    layer: ref[nn.Module]
    named_scale: float
    softcap: float | None
    scale: float


_compared: Final[WeakKeyDictionary[nn.Module, _Compared]] = WeakKeyDictionary()


def logprobs_of(model: Any, input_ids: Tensor, labels: Tensor, *, temperature: float = 1.0, **inputs: Any) -> Tensor:
    """Return the log-prob of each label but the first by a transformers model, without the logits of all tokens.

    ``out[b, j] = log_softmax(logits[b, j] / temperature)[labels[b, j + 1]]``. The model is called once, as it is: what a
    trainer has wrapped around it (data parallelism, autocast, an adapter) takes part. Its own head computes one
    position of each sequence, and `selected_logprobs` the others.

    Args:
        model: a causal language model of transformers, plain or wrapped.
        input_ids: int64 [B, T].
        labels: int64 [B, T], aligned to ``input_ids``; what is -100 is not scored, and the first of a sequence never is.
        temperature: divides the logits.
        inputs: what else the model takes: ``attention_mask``, ``position_ids``, ...

    Returns:
        [B, T - 1], nats, fp32 (fp64 for an fp64 head); 0.0 without a gradient where the label is -100. Goes into
        `TokenBatch.from_labels` with the same labels.

    Raises:
        ShapeError: the shapes do not fit, or a label lies outside the vocabulary.
        UnsupportedError: the model is no causal one, its logits are not hidden states times a head, it adds an auxiliary
            loss, or its head is trained and sharded.
    """
    for name, given in (("input_ids", input_ids), ("labels", labels)):
        if not isinstance(given, Tensor):
            raise ShapeError(f"{name} must be an int64 tensor [B, T], got {type(given).__name__}")
    if input_ids.dim() != 2 or labels.shape != input_ids.shape or labels.dtype != torch.int64:
        raise ShapeError(
            f"labels must be int64 of the shape of input_ids, [B, T], got {labels.dtype} {list(labels.shape)} for input_ids "
            f"{list(input_ids.shape)}"
        )
    left_out = sorted(_OWN_INPUTS & inputs.keys())
    if left_out or inputs.get("return_dict") is False:
        raise ConfigError(
            "logprobs_of takes the labels itself, scores all of them, and reads the model's outputs by name: leave out "
            f"{left_out[0] if left_out else 'return_dict'}"
        )
    _require_ids(labels, None)
    hidden, head = _hidden_states(model, input_ids, inputs)
    _require_ids(labels, head.weight.shape[0])
    targets = labels[:, 1:].to(hidden.device)
    needed = targets != _IGNORED
    return selected_logprobs(
        hidden[:, :-1], head, torch.where(needed, targets, 0), needed=needed, temperature=temperature
    )


def logprobs_from_logits(logits: Tensor, labels: Tensor, *, shifted: bool = False) -> Tensor:
    """Return the log-prob of each label from logits that a trainer has computed already.

    Do not flatten a batch to [B T, V]: each row must be one sequence, whose first label has no logits before it. Among
    flattened ones the first label of a sequence would be scored by the last logits of the sequence before.

    Args:
        logits: [..., T, V], any float dtype; [T, V] is one sequence.
        labels: int64 [..., T], aligned to the input tokens, as transformers has them; -100 is not scored.
        shifted: the labels are shifted already, so that ``labels[..., j]`` is the token after position j.

    Returns:
        [..., T - 1], or [..., T] if ``shifted``; nats, fp32 (fp64 for fp64 logits); 0.0 without a gradient where the label
        is -100, whatever the logits are.

    Raises:
        ShapeError: the shapes do not fit, or a label lies outside the vocabulary.
    """
    if logits.dim() < 2 or labels.shape != logits.shape[:-1] or labels.dtype != torch.int64:
        raise ShapeError(
            f"labels must be int64, one per position of the logits {list(logits.shape)}, got {labels.dtype} "
            f"{list(labels.shape)}"
        )
    _require_ids(labels, logits.shape[-1])
    targets = labels if shifted else labels[..., 1:]
    scored = logits if shifted else logits[..., :-1, :]
    at = (targets != _IGNORED).reshape(-1).nonzero()[:, 0]
    chosen = scored.reshape(-1, logits.shape[-1])[at]
    wide = chosen if chosen.dtype == torch.float64 else chosen.float()
    values = -cross_entropy(wide, targets.reshape(-1)[at], reduction="none")
    return values.new_zeros(targets.numel()).index_put((at,), values).reshape(targets.shape)


def _require_ids(labels: Tensor, vocab: int | None) -> None:
    """Check that labels are token ids or -100, where looking at them is free.

    Raises:
        ShapeError: one is neither.
    """
    if labels.device.type != "cpu" or type(labels) is not Tensor or torch.compiler.is_compiling():
        return
    wrong = (labels < 0) & (labels != _IGNORED)
    if vocab is not None:
        wrong |= labels >= vocab
    if not bool(wrong.any()):
        return
    place = wrong.nonzero()[0].tolist()
    below = "" if vocab is None else f" below {vocab}, the size of the vocabulary"
    raise ShapeError(
        f"label {int(labels[tuple(place)])} at {place}: a label is a token id{below}; what is not trained is {_IGNORED}"
    )


def _hidden_states(model: Any, input_ids: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, Head]:
    """Call a model, and return what its head is given, [B, T, H], and the head."""
    causal = unwrapped(model)
    require_causal(causal)
    _require_no_auxiliary_loss(causal, inputs)
    head, layer = Head.of(causal), causal.get_output_embeddings()
    _require_usable(head, layer, input_ids, inputs)
    scale = _compared_scale(causal, layer, head)
    known = scale is not None
    answered: list[Tensor] = []
    with nullcontext() if known else large_at_the_last(layer, answered):
        given = {"use_cache": False, "input_ids": input_ids, **inputs}
        outputs, seen = _seen_by_head(model, layer, given, 1 if known else 2)
    if len(seen) != 1 or seen[0].shape[:2] != input_ids.shape:
        shapes = [list(hidden.shape) for hidden in seen]
        raise UnsupportedError(
            f"{type(causal).__name__} gives its head {shapes} for input_ids {list(input_ids.shape)}, and not all hidden "
            "states in one call (a compiled model does not say: compile its base model instead)"
        )
    if {"weight", "bias"} & vars(layer).keys():  # weight_norm, spectral_norm and pruning make them anew in each forward
        weight, bias = head_weight(layer)
        head = head._replace(weight=weight, bias=bias)
    if scale is None:
        scale = _compare(causal, seen[0][:, :2], head, answered, outputs.logits)
        if answered:
            _compared[causal] = _Compared(ref(layer), head.scale, head.softcap, scale)
    hidden = _Through.apply(seen[0], outputs.logits)  # type: ignore[no-untyped-call]
    return hidden, head._replace(scale=scale)


def _compared_scale(causal: nn.Module, layer: nn.Module, head: Head) -> float | None:
    """Return the scale of what the head is given, if that was compared since the head and its config are what they are."""
    found = _compared.get(causal)
    if found is None or found.layer() is not layer or (found.named_scale, found.softcap) != (head.scale, head.softcap):
        return None
    return found.scale


def _require_usable(head: Head, layer: nn.Module, input_ids: Tensor, inputs: dict[str, Any]) -> None:
    """Check that a head is here, and is one and the same for all rows of the call.

    Raises:
        UnsupportedError: its weight is on the device meta, or the call chooses an adapter of it for each row.
    """
    if head.weight.is_meta and not input_ids.is_meta:
        raise UnsupportedError(
            "the head's weight is on the device meta: not loaded, or kept elsewhere by accelerate until its forward; load it, "
            "or leave the head out of what is offloaded"
        )
    if inputs.get("adapter_names") is not None and hasattr(layer, "active_adapters"):
        raise UnsupportedError(
            "adapter_names chooses an adapter for each row, but the head, which has adapters, is one for all rows: call "
            "logprobs_of for the rows of one adapter at a time, after set_adapter"
        )


class _Through(torch.autograd.Function):
    """Hidden states whose backward begins at the model's outputs, though no gradient comes from there.

    There those who wrap a model wait for it: FSDP to gather weights and to reduce gradients, DDP with a static graph to reduce.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, outputs: Tensor) -> Tensor:
        """Return the hidden states."""
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        """Return the cotangent, and none for the outputs: their hooks run nevertheless, at no cost."""
        return cotangent, None


def _require_no_auxiliary_loss(causal: Any, inputs: dict[str, Any]) -> None:
    """Check that a mixture of experts adds no loss of its routers.

    Raises:
        UnsupportedError: it does, by its config or because this call asks for it.
    """
    asked = inputs.get("output_router_logits")
    if getattr(causal.config.get_text_config(), "output_router_logits", False) if asked is None else asked:
        raise UnsupportedError(
            "config.output_router_logits adds an auxiliary loss to this mixture-of-experts model, which a loss on log-probs "
            "would drop: set it to False, or add outputs.aux_loss of a call of your own"
            if asked is None
            else "output_router_logits=True asks for an auxiliary loss, which a loss on log-probs would drop: leave it out, "
            "or add outputs.aux_loss of a call of your own"
        )


def _seen_by_head(model: Any, head: nn.Module, inputs: dict[str, Any], kept: int) -> tuple[Any, list[Tensor]]:
    """Call a model; return its outputs for so many first positions, and what its head was given at all."""
    seen: list[Tensor] = []

    def keep_first(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        seen.append(given[0])
        return given[0][:, :kept], *given[1:]

    hook = head.register_forward_pre_hook(keep_first)
    try:
        return model(**inputs), seen
    finally:
        hook.remove()


@torch.no_grad()
def _compare(causal: Any, hidden: Tensor, head: Head, answered: list[Tensor], theirs: Tensor) -> float:
    """Compare head times hidden state with what the model itself answers; return the scale of what its head is given.

    Most models scale their head's answers. MiniCPM 3 scales what its head is given, so that no scale is left.
    """
    bias = None if head.bias is None else gathered(head.bias)
    whole = head._replace(weight=gathered(head.weight), bias=bias)
    # Autocast computes in half precision, and a trainer may widen what comes out.
    half = any(torch.equal(theirs.to(dtype).to(theirs.dtype), theirs) for dtype in _HALF)
    limit = _HALF_TOLERANCE if half else _TOLERANCE[theirs.dtype]
    difference = math.inf
    for scale in dict.fromkeys((head.scale, 1.0)):
        distance = distance_to_own(hidden, whole._replace(scale=scale), answered, theirs)
        if distance <= limit:
            return scale
        difference = min(difference, distance)
    raise UnsupportedError(
        f"{type(causal).__name__} does not compute its logits as hidden states times a head (relative difference "
        f"{difference:.2g}); give selected_logprobs its hidden states and a Head with its scale and softcap"
    )
