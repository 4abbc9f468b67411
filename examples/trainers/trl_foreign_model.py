"""TRL's GRPOTrainer with its own loss, on a model that a backend of pullback computes: TRL never sees its graphs.

The trainer asks for log-probs and gives their cotangents back, which is all that either side needs of the other. TRL's
proposal of foreign model compute (its pull request 6676) is not released; until then two places are overridden.
"""

from __future__ import annotations

from collections.abc import Callable
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
        self.backend.optim_step(self.params).result()


class ForeignModelGRPOTrainer(GRPOTrainer):  # type: ignore[misc]  # trl is not typed here
    """Its ``model`` is the backend's, so that it samples with the present weights."""

    backend: TorchBackend

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **options: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        entropies = self.top_entropy_quantile < 1 or self._entropy_bonus_enabled
        if self.aux_loss_enabled or entropies or self.temperature != 1:
            raise NotImplementedError("routers' losses, entropies and temperatures are no functions of the log-probs")
        if not torch.is_grad_enabled():  # the reference's, or the sampler's: nothing comes back for them
            given = (model, input_ids, attention_mask, logits_to_keep, *args)
            return super()._get_per_token_logps_and_entropies(*given, **options)[:3]  # type: ignore[no-any-return]
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
        own = logprobs[:, -logits_to_keep:]
        return own, torch.full_like(own, torch.nan).detach(), None
