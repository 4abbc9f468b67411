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
from ....ops.head import Head, require_causal, require_linear
from ....ops.own_logits import distance_to_own, large_at_the_last
from .adapters import active_adapter, require_frozen_base, require_supported
from .checkpointing import checkpoint_layers
from .facts.logit_parameters import require_no_others
from .facts.model_facts import attention_width, read_facts
from .facts.probing import in_float32, perturbed_adapters
from .facts.quantized import is_quantized, require_plain_head, require_weights_only
from .facts.rescaling import keep_unscaled
from .facts.rope import forward_by_length, reset_dynamic_rope
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
        self.is_lora = hasattr(model, "get_base_model")
        self.outside: frozenset[str] | None = None  # names of what is trained beside an adapter, once they are sharded
        causal = self.causal
        self.config: Any = causal.config.get_text_config()
        require_causal(causal)
        self.facts = read_facts(causal.config)
        if self.is_lora:
            require_supported(model)
        if getattr(self.config, "output_router_logits", False):
            raise UnsupportedError(
                "config.output_router_logits adds an auxiliary loss to this mixture-of-experts model that a loss on log-probs "
                "would drop; set it to False"
            )
        require_linear(causal.get_output_embeddings())
        require_plain_head(causal, causal.get_output_embeddings())
        require_weights_only(causal)
        keep_unscaled(self._base, is_quantized(causal))
        self.eval()
        self.attends_by_segment = compile is None and install(causal)
        if gradient_checkpointing:
            checkpoint_layers(causal)
        base = self._base
        self._call: Any = (
            base.forward if compile is None else torch.compile(base.forward, backend=compile, dynamic=True)
        )
        self._check_logits()
        require_no_others(causal, base, causal.get_output_embeddings())

    @property
    def causal(self) -> Any:
        """The transformers model, below its adapter."""
        return cast(Any, self.model).get_base_model() if self.is_lora else self.model

    @property
    def _base(self) -> Any:
        causal = self.causal
        return getattr(causal, causal.base_model_prefix, None) or causal.model  # Llama 4 names a prefix that it lacks

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a text."""
        for config in (getattr(self.causal, "generation_config", None), self.config):
            ids = getattr(config, "eos_token_id", None)
            if ids is not None:
                return tuple(ids) if isinstance(ids, (list, tuple)) else (int(ids),)
        return ()

    @property
    def attention_flops_per_pair(self) -> float:
        """Two products of the width of all heads, in every layer."""
        return 4.0 * attention_width(self.config)

    def hidden_states(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return the last hidden states, [R, L, H]."""
        packed = tokens.shape[0] == 1 and bool((positions[0, 1:] != positions[0, :-1] + 1).any())
        if not packed:
            return self._run(input_ids=tokens)
        if self.facts.longrope is not None:
            return forward_by_length(tokens, positions, self.facts.longrope, self._packed_states)
        return self._packed_states(tokens, positions)

    def _packed_states(self, tokens: Tensor, positions: Tensor) -> Tensor:
        # transformers keeps packed sequences apart by their positions, but only without a cache.
        segments: AbstractContextManager[dict[str, Any]]
        segments = packed_inputs(positions) if self.attends_by_segment else nullcontext({})
        with segments as extra:
            return self._run(input_ids=tokens, position_ids=positions, **extra)

    def cached_states(self, tokens: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """Return the last hidden states of tokens that follow what a ``DynamicCache`` holds, and add them to it."""
        base = self._base
        # Named so since transformers 5.24.
        name = "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"
        found = base(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=True, **{name: cache})
        return cast(Tensor, found[0])

    def _run(self, **inputs: Any) -> Tensor:
        if self.facts.dynamic_rope is not None:
            reset_dynamic_rope(self)
        return cast(Tensor, self._call(use_cache=False, **inputs)[0])

    def head(self) -> Head:
        """Return the output projection with the scaling and capping that the config asks for."""
        return self._head(None)

    def _head(self, dtype: torch.dtype | None) -> Head:
        """Return the head, summed with its adapter in ``dtype``; None: that of its weights."""
        head = Head.of(self.causal)
        if dtype is None:
            return head
        return head._replace(weight=head.weight.to(dtype), bias=None if head.bias is None else head.bias.to(dtype))

    @property
    def device(self) -> torch.device:
        """Where the head, and so the log-probs, live."""
        return cast(torch.device, self.causal.get_input_embeddings().weight.device)

    @contextmanager
    def base_only(self) -> Iterator[None]:
        """Switch the adapter off: the model is its own frozen reference.

        Raises:
            MissingReferenceError: what is then left is not the base as it was before training.
        """
        require_frozen_base(self.model)
        with cast(Any, self.model).disable_adapter():
            yield

    def adapter_weights(self) -> dict[str, Tensor]:
        """Return the adapter's live weights under PEFT's names."""
        peft = require_extra("peft", "hf", "an adapter checkpoint")
        name = active_adapter(self.model)
        return dict(peft.get_peft_model_state_dict(self.model, adapter_name=name, save_embedding_layers=False))

    def trained_outside(self) -> dict[str, Tensor]:
        """Return the live weights that are trained beside the adapter, and that PEFT's file of it does not hold."""
        if self.outside is not None:
            return {name: p.detach() for name, p in self.model.named_parameters() if name in self.outside}
        held = {tensor.data_ptr() for tensor in self.adapter_weights().values()}
        named = self.model.named_parameters()
        return {name: p.detach() for name, p in named if p.requires_grad and p.data_ptr() not in held}

    def write_adapter_config(self, folder: Path) -> None:
        """Write ``adapter_config.json``, so that peft can load the checkpoint's folder."""
        cast(Any, self.model).peft_config[active_adapter(self.model)].save_pretrained(str(folder))

    @torch.no_grad()
    def _check_logits(self) -> None:
        """Check that head times hidden states is what the model itself answers, and answers again."""
        try:
            with perturbed_adapters(self), in_float32(self):
                difference, again, tolerance = self._logits_apart()
        except (torch.OutOfMemoryError, UnsupportedError):
            raise
        except Exception as error:  # whatever a model raises
            raise self._unsupported(f"cannot be run on tokens alone, as hidden states and a head: {error}") from error
        if not again <= tolerance:
            raise self._unsupported(
                "gives other logits each time, in evaluation mode too, so that no two policies can be compared; often a "
                "functional dropout that is not given module.training"
            )
        if not difference <= tolerance:
            raise self._unsupported(
                f"does not compute its logits as hidden states times a head (relative difference {difference:.2g}); "
                "write an adapter with hidden_states and head"
            )

    def _logits_apart(self) -> tuple[float, float, float]:
        """Return how far our logits are from the model's own, those from themselves when asked again, and the tolerance."""
        device = self.causal.get_input_embeddings().weight.device
        tokens = torch.arange(4, device=device)[None] % self.config.vocab_size
        hidden = self.hidden_states(tokens, torch.arange(4, device=device)[None])
        answered: list[Tensor] = []
        with large_at_the_last(self.causal.get_output_embeddings(), answered):
            theirs, tolerance = self._own_logits(tokens), _LOGITS_TOLERANCE[hidden.dtype]
            difference = distance_to_own(hidden, self._head(hidden.dtype), answered, theirs)
            # The numbers at the last position are the same each time, and would hide how far the others are apart.
            again = 0.0 if difference <= tolerance else _relative(self._own_logits(tokens)[:, :-1], theirs[:, :-1])
        return difference, again, tolerance

    def _own_logits(self, tokens: Tensor) -> Tensor:
        return cast(Tensor, self.causal(input_ids=tokens, use_cache=False).logits.double())

    def _unsupported(self, words: str) -> UnsupportedError:
        head = self.causal.get_output_embeddings()
        kind = f"{type(head).__module__}.{type(head).__name__}"
        advice = (
            f"; the adapter on its head ({kind}) may be no matrix that is added: leave the head out of target_modules"
        )
        name = type(self.causal).__name__
        return UnsupportedError(f"{name} {words}{advice if hasattr(head, 'get_base_layer') else ''}")


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp(min=1e-30))
