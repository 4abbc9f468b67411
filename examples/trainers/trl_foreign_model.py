"""TRL's GRPOTrainer with its own loss, on a model that a backend of pullback computes: TRL never sees its graphs.

The trainer asks for log-probs and gives their cotangents back. TRL's own way for it (its pull request 6676) is not out yet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from pullback.backends import AdamParams, TorchBackend
from pullback.datums import Datum, ModelInput


class BackendOptimizer(torch.optim.Optimizer):
    """What the trainer takes for its optimizer: its step is the backend's, and takes what the backend has accumulated."""

    def __init__(self, backend: TorchBackend, params: AdamParams) -> None:
        super().__init__([torch.nn.Parameter(torch.zeros(()))], {"lr": params.learning_rate})
        self.backend, self.params = backend, params

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        self.backend.optim_step(replace(self.params, learning_rate=self.param_groups[0]["lr"])).result()


class ForeignModelGRPOTrainer(GRPOTrainer):  # type: ignore[misc]  # trl is not typed here
    """Its ``model`` is that of its ``backend``, so that it samples with the present weights."""

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float:  # the trainer's own multiplies gradients by 1
        return float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **options: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        others = self.aux_loss_enabled or self.top_entropy_quantile < 1 or self._entropy_bonus_enabled
        images = any(options.get(x) is not None for x in ("pixel_values", "token_type_ids", "mm_token_type_ids"))
        if others or self.temperature != 1 or images or self.args.max_grad_norm:
            raise NotImplementedError("routers, entropies, temperatures, images, or max_grad_norm (clip by AdamParams)")
        if not torch.is_grad_enabled():  # the reference's, or the sampler's: nothing comes back for them
            args = (model, input_ids, attention_mask, logits_to_keep, *args)
            return super()._get_per_token_logps_and_entropies(*args, **options)  # type: ignore[no-any-return]
        rows = [ids[mask.bool()] for ids, mask in zip(input_ids, attention_mask, strict=True)]
        data = [Datum(ModelInput.from_ints(ids[:-1]), {"target_tokens": ids[1:]}) for ids in rows]
        retained = self.backend.forward_retain(data).result()
        scored = attention_mask[:, 1:].bool() & attention_mask[:, :-1].bool()
        logprobs = torch.zeros(scored.shape, dtype=retained.logprobs[0].dtype)
        logprobs[scored] = torch.cat(list(retained.logprobs))

        def backward(cotangents: Tensor) -> None:
            given = [row[has] for row, has in zip(cotangents, scored, strict=True)]
            self.backend.backward({retained: range(len(data))}, data, cotangents=given).result()

        logprobs.requires_grad_().register_hook(backward)
        return logprobs[:, -logits_to_keep:], torch.full_like(logprobs.detach()[:, -logits_to_keep:], torch.nan), None
