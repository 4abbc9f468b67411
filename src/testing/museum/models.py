"""Defects of models and of what is done to them: leaks, positions, windows, routing, dropout, heads, adapters."""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.llama import random_llama
from ..models.zoo import build
from .exhibit import Exhibit

__all__ = ["MODELS"]


def _plain() -> Any:
    return random_llama(vocab_size=64, hidden_size=32)


def _windowed() -> Any:
    return build("mistral", window=8)


def _positioned() -> Any:
    return build("gpt2")


def _restarts(position_ids: Tensor | None) -> bool:
    """Return whether a row holds several sequences."""
    return position_ids is not None and bool((position_ids.diff() != 1).any())


def _sees_others() -> Any:
    model = random_llama(vocab_size=64, hidden_size=32)
    model.set_attn_implementation("eager")

    forward = model.model.forward

    def one_document(input_ids: Tensor, position_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        return forward(input_ids, torch.ones_like(input_ids), **kwargs)  # positions are then those of the row

    model.model.forward = one_document
    return model


def _keeps_apart() -> Any:
    model = random_llama(vocab_size=64, hidden_size=32)
    model.set_attn_implementation("eager")
    return model


def _positions_run_on() -> Any:
    model = build("gpt2")

    def by_place(module: Any, args: Any) -> Any:
        return (torch.arange(args[0].shape[-1])[None],)

    model.transformer.wpe.register_forward_pre_hook(by_place)
    return model


def _loses_window() -> Any:
    model = build("mistral", window=8)

    def without_window(module: Any, args: Any, kwargs: Any) -> Any:
        return args, ({**kwargs, "attention_mask": None} if _restarts(kwargs["position_ids"]) else kwargs)

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(without_window, with_kwargs=True)
    return model


def _drops_tokens() -> Any:
    model = random_llama(vocab_size=64, hidden_size=32)

    def capacity(module: Any, args: Any, out: Tensor) -> Tensor:
        tokens = out.flatten(0, -2)
        kept = torch.arange(len(tokens))[:, None] < 0.75 * len(tokens)  # of the whole batch
        return (tokens * kept).view_as(out)

    model.model.layers[0].mlp.register_forward_hook(capacity)
    return model


def _always_drops_out() -> Any:
    model = random_llama(vocab_size=64, hidden_size=32)

    def dropout(module: Any, args: Any, out: Tensor) -> Tensor:
        return F.dropout(out, 0.1)

    model.model.layers[0].mlp.register_forward_hook(dropout)
    return model


def _drops_out_in_training() -> Any:
    model = random_llama(vocab_size=64, hidden_size=32)

    def dropout(module: Any, args: Any, out: Tensor) -> Tensor:
        return F.dropout(out, 0.1, module.training)

    model.model.layers[0].mlp.register_forward_hook(dropout)
    return model


def _cap_unknown() -> Any:
    model = random_llama(vocab_size=64, hidden_size=32)
    model.lm_head.weight.data *= 100.0

    def cap(module: Any, args: Any, out: Any) -> Any:
        out.logits = 30.0 * torch.tanh(out.logits / 30.0)
        return out

    model.register_forward_hook(cap)
    return model


def _cap_known() -> Any:
    model = random_llama(vocab_size=64, hidden_size=32)
    model.lm_head.weight.data *= 100.0
    model.config.final_logit_softcapping = 30.0

    def cap(module: Any, args: Any, out: Any) -> Any:
        out.logits = 30.0 * torch.tanh(out.logits / 30.0)
        return out

    model.register_forward_hook(cap)
    return model


def _head_detached() -> Any:
    model = random_llama(vocab_size=64, hidden_size=32, tie_word_embeddings=True)
    model.lm_head.forward = lambda hidden: F.linear(hidden, model.lm_head.weight.detach())
    return model


def _head_tied() -> Any:
    return random_llama(vocab_size=64, hidden_size=32, tie_word_embeddings=True)


def _with_auxiliary_loss() -> Any:
    return build("mixtral", output_router_logits=True)


def _without_auxiliary_loss() -> Any:
    return build("mixtral", output_router_logits=False)


def _biases_trained() -> Any:
    from peft import LoraConfig, get_peft_model

    model = random_llama(vocab_size=64, hidden_size=32, attention_bias=True)
    return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", bias="all"))


def _adapter_alone() -> Any:
    from peft import LoraConfig, get_peft_model

    model = random_llama(vocab_size=64, hidden_size=32, attention_bias=True)
    return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", bias="none"))


_KIND: Final = "model"

MODELS = (
    Exhibit(
        "packed rows see each other",
        "huggingface/transformers#46634 (2026)",
        "A mask of ones beside the positions switched off the recognition of packed rows: every sequence attended to those "
        "before it, and the loss still fell.",
        _sees_others,
        _keeps_apart,
        "log-probs, packed",
        "sequences see each other",
        _KIND,
    ),
    Exhibit(
        "positions run on",
        "huggingface/nanoVLM#201 (2026), pytorch/torchtitan#2559 (2026)",
        "The second text of a packed row began at position 101: positions that no prompt has at sampling time.",
        _positions_run_on,
        _positioned,
        "log-probs, packed",
        "positions do not begin anew",
        _KIND,
    ),
    Exhibit(
        "window lost where rows are packed",
        "axolotl-ai-cloud/axolotl#732 (2023), unslothai/unsloth#8253 (2026)",
        "The packed path attended past the sliding window: on long texts the loss began at 9.98 instead of 1.9.",
        _loses_window,
        _windowed,
        "log-probs, packed, beyond 8 tokens",
        "a window is lost",
        _KIND,
    ),
    Exhibit(
        "routing depends on the batch",
        "NVIDIA-NeMo/Megatron-Bridge#4635 (2026)",
        "Log-probs of a sequence depended on the unrelated ones beside it: ratios differ from 1 before the first step.",
        _drops_tokens,
        _plain,
        "log-probs, padded",
        "expert capacities",
        _KIND,
    ),
    Exhibit(
        "dropout in evaluation",
        "facebookresearch/vjepa2#160 (2026); huggingface/trl#2042 (2024) for its effect",
        "A functional dropout knows nothing of model.eval(): sampler, policy and reference differed by noise.",
        _always_drops_out,
        _drops_out_in_training,
        "loads",
        "each time",
        _KIND,
    ),
    Exhibit(
        "soft-cap dropped",
        "apple/ml-cross-entropy#48 (2025), verl-project/verl#7991 (2026)",
        "A fused head left out the cap on the logits: other probabilities and other gradients, while greedy samples agreed.",
        _cap_unknown,
        _cap_known,
        "loads",
        "hidden states times a head",
        _KIND,
    ),
    Exhibit(
        "tied head not trained",
        "huggingface/peft#1750 (2024), unslothai/unsloth#9331 (2026)",
        "The head shared its weight with the embedding, and only one of the two was trained or saved.",
        _head_detached,
        _head_tied,
        "gradient, full",
        "a tied head",
        _KIND,
    ),
    Exhibit(
        "auxiliary loss dropped",
        "huggingface/trl#7009 (2026)",
        "The loss that balances the experts is added to the model's own loss; a trainer that computes another one dropped it, "
        "and said nothing.",
        _with_auxiliary_loss,
        _without_auxiliary_loss,
        "loads",
        "auxiliary loss",
        _KIND,
    ),
    Exhibit(
        "reference moves along",
        "huggingface/trl#6975 (2026)",
        "LoRA with trained biases changes the base itself: with the adapter switched off it is no frozen reference.",
        _biases_trained,
        _adapter_alone,
        "reference",
        "bias",
        _KIND,
        {"lora": None},
    ),
)
