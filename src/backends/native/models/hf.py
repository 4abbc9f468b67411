"""transformers and peft models behind the two-method adapter (extra ``hf``)."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from ....errors import UnsupportedError, require_extra
from ....ops.head import Head
from ....ops.logprobs import head_logits
from .packed_attention import install, packed_inputs

__all__ = ["HFModel"]

_LOGITS_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}


@final
class HFModel(nn.Module):
    """A transformers causal language model, plain or wrapped by peft.

    Args:
        model: ``AutoModelForCausalLM`` or ``PeftModel``.
        gradient_checkpointing: recompute each layer's activations in the backward.
        compile: a backend of ``torch.compile`` for the base model, e.g. ``inductor``; packed sequences then attend under a
            mask, since one compiled graph must serve all lengths. Sampling is not compiled.

    Raises:
        UnsupportedError: the model computes its logits in a way that is not hidden states times a head, adds an
            auxiliary loss, or has an adapter that is no LoRA of its layers.
    """

    def __init__(self, model: nn.Module, *, gradient_checkpointing: bool = False, compile: str | None = None) -> None:
        super().__init__()
        self.model = model
        self.is_lora = hasattr(model, "peft_config")
        causal = self._causal
        self.config: Any = causal.config.get_text_config()
        if self.is_lora and any(c.is_prompt_learning for c in cast(Any, model).peft_config.values()):
            raise UnsupportedError("prompt-learning adapters add virtual tokens; use a LoRA-like adapter")
        if getattr(self.config, "output_router_logits", False):
            raise UnsupportedError(
                "config.output_router_logits adds an auxiliary loss to this mixture-of-experts model that a loss on log-probs "
                "would drop; set it to False"
            )
        output = causal.get_output_embeddings()
        if not isinstance(output, nn.Linear) and not hasattr(output, "get_delta_weight"):
            raise UnsupportedError(
                f"the head is a {type(output).__name__}, not a linear layer; leave lm_head out of the adapter's target_modules"
            )
        self.eval()
        self.attends_by_segment = compile is None and install(causal)
        self._checkpointed = self._checkpoint_layers() if gradient_checkpointing else []
        base: Any = getattr(causal, causal.base_model_prefix)
        self._call: Any = (
            base.forward if compile is None else torch.compile(base.forward, backend=compile, dynamic=True)
        )
        self._check_logits()

    @property
    def _causal(self) -> Any:
        return cast(Any, self.model).get_base_model() if self.is_lora else self.model

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a text."""
        for config in (getattr(self._causal, "generation_config", None), self.config):
            ids = getattr(config, "eos_token_id", None)
            if ids is not None:
                return tuple(ids) if isinstance(ids, (list, tuple)) else (int(ids),)
        return ()

    @property
    def attention_flops_per_pair(self) -> float:
        """Two products of the width of all heads, in every layer."""
        heads = self.config.num_attention_heads
        width = heads * (getattr(self.config, "head_dim", None) or self.config.hidden_size // heads)
        return 4.0 * float(width) * float(self.config.num_hidden_layers)

    def hidden_states(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return the last hidden states, [R, L, H]."""
        packed = tokens.shape[0] == 1 and bool((positions[0, 1:] != positions[0, :-1] + 1).any())
        # transformers keeps packed sequences apart by their positions, but only without a cache.
        if not packed:
            return cast(Tensor, self._run(input_ids=tokens)[0])
        segments: AbstractContextManager[dict[str, Any]]
        segments = packed_inputs(positions) if self.attends_by_segment else nullcontext({})
        with segments as extra:
            return cast(Tensor, self._run(input_ids=tokens, position_ids=positions, **extra)[0])

    def cached_states(self, tokens: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """Return the last hidden states of tokens that follow what a ``DynamicCache`` holds, and add them to it."""
        self._switch_checkpointing()
        base = getattr(self._causal, self._causal.base_model_prefix)
        # Named so since transformers 5.24.
        name = "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"
        found = base(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=True, **{name: cache})
        return cast(Tensor, found[0])

    def _run(self, **inputs: Any) -> Any:
        self._switch_checkpointing()
        return self._call(use_cache=False, **inputs)

    def _switch_checkpointing(self) -> None:
        for layer in self._checkpointed:
            # A layer recomputes only in training mode, and then drops its cache: never while sampling. What lies
            # below it (dropout) stays in evaluation mode.
            layer.training = torch.is_grad_enabled()

    def head(self) -> Head:
        """Return the output projection with the scaling and capping that the config asks for."""
        linear = self._causal.get_output_embeddings()
        scale = float(getattr(self.config, "logit_scale", None) or 1.0)
        scale /= float(getattr(self.config, "logits_scaling", None) or 1.0)
        weight, bias = self._output_weight(linear)
        return Head(weight, bias, getattr(self.config, "final_logit_softcapping", None), scale)

    @staticmethod
    def _output_weight(linear: Any) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias; an adapter on the head is added to its weight, differentiably."""
        if isinstance(linear, nn.Linear):
            return linear.weight, linear.bias
        base = linear.get_base_layer()
        weight: Tensor = base.weight
        if not linear.disable_adapters:
            for name in linear.active_adapters:
                weight = weight + linear.get_delta_weight(name).to(weight.dtype)
        return weight, base.bias

    @property
    def device(self) -> torch.device:
        """Where the head, and so the log-probs, live."""
        return cast(torch.device, self._causal.get_input_embeddings().weight.device)

    @contextmanager
    def base_only(self) -> Iterator[None]:
        """Switch the adapter off: the model is its own frozen reference."""
        with cast(Any, self.model).disable_adapter():
            yield

    def adapter_weights(self) -> dict[str, Tensor]:
        """Return the adapter's live weights under PEFT's names."""
        peft = require_extra("peft", "hf", "an adapter checkpoint")
        return dict(peft.get_peft_model_state_dict(self.model, save_embedding_layers=False))

    def write_adapter_config(self, folder: Path) -> None:
        """Write ``adapter_config.json``, so that peft can load the checkpoint's folder."""
        cast(Any, self.model).peft_config["default"].save_pretrained(str(folder))

    def _checkpoint_layers(self) -> list[nn.Module]:
        settings = {"use_reentrant": False}
        if hasattr(self._causal, "activation_checkpointing_enable"):  # its newer name
            self._causal.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
        else:
            self._causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
        self._causal.disable_input_require_grads()  # only the reentrant kind needs gradients at the embeddings
        return [module for module in self.modules() if getattr(module, "gradient_checkpointing", False)]

    @torch.no_grad()
    def _check_logits(self) -> None:
        """Compare head times hidden states with what the model itself answers."""
        device = self._causal.get_input_embeddings().weight.device
        tokens = torch.arange(4, device=device)[None] % self.config.vocab_size
        ours = head_logits(self.hidden_states(tokens, torch.arange(4, device=device)[None])[0], self.head()).double()
        theirs = self._causal(input_ids=tokens, use_cache=False).logits[0].double()
        difference = float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))
        if not difference <= _LOGITS_TOLERANCE.get(self.head().weight.dtype, 5e-2):
            raise UnsupportedError(
                f"{type(self._causal).__name__} does not compute its logits as hidden states times a head (relative difference "
                f"{difference:.2g}); write an adapter with hidden_states and head"
            )
