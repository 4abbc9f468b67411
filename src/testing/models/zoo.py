"""Tiny random models of every causal language model architecture in the installed transformers: no download."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch

from ...errors import require_extra

__all__ = ["build", "model_types", "tiny_config"]

_VOCABULARY: Final = 64
_SIZES: Final[Mapping[str, Any]] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), _VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "word_embed_proj_dim", "embedding_size", "lru_width"), 32),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner"), 48),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "dff", "shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "attention_heads", "decoder_attention_heads"), 4),
    "encoder_attention_heads": 4,
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "qk_nope_head_dim", "v_head_dim", "query_pre_attn_scalar", "global_head_dim"), 8),
    **dict.fromkeys(("rotary_dim", "qk_rope_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "experts_per_token", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_expert_group"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "seq_length", "max_seq_len"), 512),
    **dict.fromkeys(("initializer_range", "init_std"), 0.2),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "output_router_logits": False,
}
_WINDOWS: Final = ("sliding_window", "attention_window_size", "attention_chunk_size", "window_size", "local_attention")
# What an architecture needs beyond the sizes above, or otherwise.
_OWN: Final[Mapping[str, Mapping[str, Any]]] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8},
    "cpmant": {"position_bias_max_distance": 64, "prompt_types": 2, "segment_types": 2, "prompt_length": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {"intermediate_size_mlp": 48},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
    "reformer": {"is_decoder": True},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}


def model_types() -> tuple[str, ...]:
    """Return the ``model_type`` of every causal language model that transformers has.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    require_extra("transformers", "hf", "the tiny models")
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str, *, window: int | None = None, **changes: Any) -> Any:
    """Return a config with two layers of width 32, and one layer of each kind that the architecture mixes.

    Args:
        model_type: of transformers.
        window: of sliding or chunked attention, tokens, where the architecture has it.
        changes: fields to set otherwise, where the config has them or not.
    """
    transformers = require_extra("transformers", "hf", "a tiny model")
    kind = transformers.AutoConfig.for_model(model_type).__class__
    return kind(**{**_fields(kind(), window), **_OWN.get(model_type, {}), **changes})


def build(model_type: str, *, window: int | None = None, seed: int = 0, **changes: Any) -> Any:
    """Return a random model, the same for the same arguments; arguments as of `tiny_config`."""
    transformers = require_extra("transformers", "hf", "a tiny model")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(tiny_config(model_type, window=window, **changes))


def _fields(default: Any, window: int | None) -> dict[str, Any]:
    """Return the small sizes that a config knows; nested configs alike."""
    known = default.to_dict()
    aliases = {name for name, own in default.attribute_map.items() if own not in _SIZES}
    found = {name: value for name, value in _SIZES.items() if name in known or name in aliases}
    if window is not None:
        found |= {
            name: window for name in _WINDOWS if known.get(name, 0) or (name == "sliding_window" and name in known)
        }
        found |= {"use_sliding_window": True, "max_window_layers": 1} if "use_sliding_window" in known else {}
    kinds = list(dict.fromkeys(known.get("layer_types") or ()))
    if kinds:
        found["layer_types"] = kinds if len(kinds) > 1 else kinds * 2
        found["num_hidden_layers"] = len(found["layer_types"])
    if "kv_lora_rank" in known:
        found["num_key_value_heads"] = 4  # latent attention has as many keys as queries
    for name in ("text_config", "decoder_config"):  # of a model that also sees or hears
        if isinstance(known.get(name), dict) and hasattr(default, name):
            found[name] = _fields(getattr(default, name), window)
    return found
