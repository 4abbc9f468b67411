"""Tiny random models of every causal language model architecture in the installed transformers: no download."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch

from ...errors import require_extra

__all__ = ["build", "model_types", "tiny_config"]

_VOCABULARY: Final = 64
_SIZES: Final[Mapping[str, Any]] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), _VOCABULARY),
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
_LOOKS: Final[Mapping[str, Any]] = {  # of the part of a model that sees or hears
    **dict.fromkeys(("num_hidden_layers", "num_blocks"), 1),
    **dict.fromkeys(("hidden_size", "intermediate_size", "mlp_dim", "output_channels", "ext_pw_out_channel"), 32),
    **dict.fromkeys(("depthwise_separable_out_channel", "nemo_conv_channels"), 32),
    "num_attention_heads": 4,
}
_MAMBA: Final[Mapping[str, Any]] = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}
_LINEAR: Final = "linear_attention"
_DOTS: Final[Mapping[str, Any]] = {
    **{"per_layer_config": {}, "shared_experts_intermediate_size": 48, "index_head_dim": 16},
    **{"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16},
}
_GEMMA_3N: Final[Mapping[str, Any]] = {
    **{"num_kv_shared_layers": 0, "intermediate_size": 48, "activation_sparsity_pattern": [0.95, 0.0]},
}
_QWEN4: Final[Mapping[str, Any]] = {
    **{"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8},
    **{"indexer_budget": 64, "indexer_compress_ratio": 4, "ngram_vocab_size_base": 64},
}
# What an architecture needs beyond the sizes above, or otherwise.
_OWN: Final[Mapping[str, Mapping[str, Any]]] = {
    "bamba": _MAMBA,
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "encoder_config": {**_LOOKS, "hidden_size_global": 32, "num_key_value_heads": 4},
        "decoder_config": {**_LOOKS, "hidden_size_global": 32, "num_key_value_heads": 4, "head_dim": 8},
        "global_config": {**_LOOKS, "num_key_value_heads": 4, "head_dim": 8},
        "patcher_config": {**_LOOKS, "num_key_value_heads": 4, "head_dim": 8},
        "vocab_size": 260,
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            name: {"rope_type": "default", "rope_theta": 1e4} for name in ("sliding_attention", "full_attention")
        },
    },
    "cpmant": {"position_bias_max_distance": 64, "prompt_types": 2, "segment_types": 2, "prompt_length": 2},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dory": {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    | dict.fromkeys(("n_input_layers", "n_recurrent_layers"), 1)
    | {"n_output_layers": 0},
    "dots3_note": {
        "text_config": _DOTS,
        "vision_config": {**_LOOKS, "adapter_in_dim": 32, "adapter_out_dim": 32, "per_layer_config": {}},
        "audio_config": {**_LOOKS, "adapter_input_size": 32, "adapter_out_dim": 32, "num_key_value_heads": 4},
    },
    "dots3_note_text": _DOTS,
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64, "mamba_chunk_size": 32},
    "gemma3": {"vision_config": _LOOKS},
    "gemma3n": {"text_config": _GEMMA_3N},
    "gemma3n_text": _GEMMA_3N,
    "gemma4_assistant": {
        "text_config": {
            **{"model_type": "gemma4_text", "vocab_size": _VOCABULARY, "hidden_size": 32, "intermediate_size": 48},
            **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
            **{"global_head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
            **{"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 2},
        },
        "backbone_hidden_size": 32,
    },
    "git": {"vision_config": _LOOKS},
    "got_ocr2": {"vision_config": _LOOKS},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": _MAMBA,
    "inkling2_loop_text": {
        "layer_types": ["hybrid_sliding", "hybrid_sliding", "hybrid"],
        "num_hidden_layers": 3,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 2,
        "n_layers_per_attn_res_block": 1,
        "initializer_range": 0.1,
    },
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {"intermediate_size_mlp": 48},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
    "moss_transcribe_diarize": {"audio_config": _LOOKS},
    "phi4_multimodal": {"vision_config": _LOOKS, "audio_config": _LOOKS},
    "nemotron_h": {
        **{"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 32},
        "moe_shared_expert_intermediate_size": 48,
    },
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {"is_decoder": True, "axial_pos_shape": [16, 32], "axial_pos_embds_dim": [16, 16]},
    "roc_bert": {"pronunciation_embed_dim": 8, "shape_embed_dim": 8, "shape_vocab_size": 64},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": [_LINEAR, "hybrid", "hybrid"],
        "num_hidden_layers": 3,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "zamba2": {"layers_block_type": [_LINEAR, "hybrid"], "mamba_d_state": 8, "adapter_rank": 8, "chunk_size": 32},
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
    kind = transformers.CONFIG_MAPPING[model_type]
    try:
        fields = _fields(kind(), window)
    except Exception:  # a config may refuse its own defaults
        fields = {}
    config = kind(**_merged(fields, {**_OWN.get(model_type, {}), **changes}))
    return config.decoder if model_type.startswith("musicgen") else config


def build(model_type: str, *, window: int | None = None, seed: int = 0, **changes: Any) -> Any:
    """Return a random model, the same for the same arguments; arguments as of `tiny_config`."""
    transformers = require_extra("transformers", "hf", "a tiny model")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = tiny_config(model_type, window=window, **changes)
        if model_type.startswith("musicgen"):  # its causal part is made from a config that the auto class does not know
            return getattr(transformers, _class_name(model_type))(config)
        return transformers.AutoModelForCausalLM.from_config(config)


def _class_name(model_type: str) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])


def _merged(fields: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields with an architecture's own; those of its parts are merged too."""
    found = dict(fields)
    for name, value in own.items():
        nested = name.endswith("_config") and isinstance(value, Mapping) and isinstance(found.get(name), dict)
        found[name] = {**found[name], **value} if nested else value
    return found


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
    for name in ("text_config", "decoder_config", "decoder"):  # of a model that also sees or hears
        if isinstance(known.get(name), dict) and hasattr(default, name):
            found[name] = _fields(getattr(default, name), window)
    return found
