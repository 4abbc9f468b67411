"""What several processes are held to: models, losses and data, and how far they end from one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, final

import torch
from helpers import TINY, tiny_llama
from torch import Tensor, nn

from pullback.backends import AdamParams, TorchBackend
from pullback.backends.native import HFModel
from pullback.backends.native.models.lora import add_lora
from pullback.datums import Datum
from pullback.ops.head import Head
from pullback.testing import TinyLM, example_datums, random_llama

__all__ = ["LOSSES", "MODELS", "PARAMS", "VOCAB", "apart", "batch", "coupled", "ordered", "steps"]

VOCAB: Final = 24
PARAMS: Final = AdamParams(learning_rate=1e-2, grad_clip_norm=0.5)
Given = str | Callable[[Any, list[Tensor]], tuple[Tensor, Mapping[str, float]]]


def _untied() -> nn.Module:
    model: nn.Module = random_llama(vocab_size=VOCAB, tie_word_embeddings=False, dtype=torch.float64, **TINY)
    return model


def _experts() -> HFModel:
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.Qwen3MoeConfig(
            **TINY,
            vocab_size=VOCAB,
            moe_intermediate_size=8,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            experts_implementation="eager",
        )
        return HFModel(transformers.Qwen3MoeForCausalLM(config).double())


def _with_head() -> HFModel:
    """An adapter on layers and head, beside which a norm is trained."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = add_lora(_untied(), {"r": 4, "target_modules": ["q_proj", "lm_head"], "modules_to_save": None})
        for name, p in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.1)
            if name.endswith("model.norm.weight"):
                p.requires_grad_(True)
    return HFModel(model)


@final
class Routed(nn.Module):
    """A model that has a weight for token 0 alone, which forwards that only keep step are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.base = TinyLM(vocab_size=VOCAB)
        self.for_zero = nn.Linear(8, 8, bias=False, dtype=torch.float64)
        nn.init.eye_(self.for_zero.weight)

    def hidden_states(self, tokens: Tensor, positions: Tensor) -> Tensor:
        hidden: Tensor = self.base.hidden_states(tokens, positions)
        zero = tokens == 0
        return torch.where(zero[..., None], self.for_zero(hidden), hidden) if bool(zero.any()) else hidden

    def head(self) -> Head:
        return self.base.head()


MODELS: Final[dict[str, Callable[[], nn.Module]]] = {
    "full": lambda: HFModel(_untied()),
    "tied": lambda: tiny_llama(vocab=VOCAB),
    "lora": lambda: tiny_llama(lora=4, vocab=VOCAB),
    "head": _with_head,
    "experts": _experts,
    "checkpointing": lambda: HFModel(_untied(), gradient_checkpointing=True),
    "routed": Routed,
}


def coupled(data: Sequence[Datum], logprobs: list[Tensor]) -> tuple[Tensor, Mapping[str, float]]:
    """Couple the whole batch: each sequence against the mean of all."""
    sums = torch.stack([x.sum() for x in logprobs])
    return nn.functional.softplus(sums.mean() - sums).sum() + torch.logsumexp(0.1 * sums, 0), {
        "mean": float(sums.detach().mean())
    }


def ordered(data: Sequence[Datum], logprobs: list[Tensor]) -> tuple[Tensor, Mapping[str, float]]:
    """Weigh each sequence by its place in the batch."""
    return torch.stack([(i + 1) * (x.exp() ** 2).sum() for i, x in enumerate(logprobs)]).sum(), {}


LOSSES: Final[dict[str, Given]] = {
    "cross_entropy": "cross_entropy",
    "ppo": "ppo",
    "grpo": "grpo",
    "gspo": "gspo",
    "dpo": "dpo",
    "orpo": "orpo",
    "coupled": coupled,
    "ordered": ordered,
}


def batch(lengths: Sequence[int] = (9, 5, 12, 3, 7, 11, 4, 8), seed: int = 3) -> list[Datum]:
    return example_datums(list(lengths), seed=seed, vocab_size=VOCAB)


def add(backend: TorchBackend, given: Given, data: Sequence[Datum]) -> Any:
    """Accumulate one call."""
    if callable(given):
        return backend.forward_backward_custom(data, given).result()
    return backend.forward_backward(data, given).result()


def steps(backend: TorchBackend, given: Given, calls: Sequence[Sequence[Datum]], mode: Any = None) -> dict[str, Tensor]:
    """Make three clipped steps, and return all that a defect could show in, by name."""
    found: dict[str, Tensor] = {}
    norms, results = [], []
    for step in range(3):
        for data in calls:
            results += [torch.as_tensor(o["logprobs"].to_torch()) for o in add(backend, given, data).loss_fn_outputs]
        if step == 0:
            found |= {f"gradient {name}": g.clone() for name, g in backend.gradients(mode).items()}
        norms.append(backend.optim_step(PARAMS, mode).result().metrics.get("grad_norm", 0.0))
    found |= {
        "norms": torch.tensor(norms, dtype=torch.float64),
        "logprobs": torch.cat([r.reshape(-1) for r in results]),
    }
    return found | _state(backend)


def _state(backend: TorchBackend) -> dict[str, Tensor]:
    native = backend._native
    held = {**{f"weight {n}": p.detach() for n, p in native.parameters.items()}, **native.optimizer.to_tensors()}
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t.clone() for name, t in held.items()}


def apart(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the relative difference of each tensor."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    return {
        name: float((found[name] - value).double().norm() / value.double().norm().clamp(min=1e-30))
        for name, value in expected.items()
    }
