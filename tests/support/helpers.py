"""Data, models, counters and measures of difference for the tests of the native backend."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Final

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from pullback.backends import TorchBackend
from pullback.backends.native import HFModel
from pullback.datums import Datum, ModelInput
from pullback.losses import Loss
from pullback.testing import TinyLM, example_datums, random_llama

VOCAB = 17  # of `make_data` and of the tiny models
TINY: Final[Mapping[str, int]] = {  # what transformers calls the sizes of a model
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}
make_data = example_datums


def sharing(groups: list[list[int]], seed: int = 0, vocab: int = VOCAB) -> list[Datum]:
    """Return datums of these lengths; those of a group share a prefix, one token shorter than the shortest of them."""
    data, generator = [], torch.Generator().manual_seed(seed)
    for number, lengths in enumerate(groups):
        prefix = torch.randint(vocab, (min(lengths) - 1,), generator=generator)
        for datum in make_data(lengths, seed=seed + number, vocab_size=vocab, group_id=[number]):
            rest = datum.model_input.tokens[len(prefix) :]
            data.append(Datum(ModelInput.from_ints(torch.cat([prefix, rest])), datum.loss_fn_inputs))
    return data


class AllocationTracker(TorchDispatchMode):
    """Follows the storages that operators return.

    Attributes:
        peak: most bytes alive at once, without storages from before.
        largest: bytes of the largest storage.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.peak = self.largest = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._before: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in inputs:
                storage = tensor.untyped_storage()
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self.largest = max(self.largest, storage.nbytes())
        self._alive = {key: pair for key, pair in self._alive.items() if not pair[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


def flop_counter() -> FlopCounterMode:
    """Return a counter that also knows the fused attention of the CPU: two products forward, five backward."""

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        (rows, heads, length, width), others = query, value[-2]  # torch 2.11's own count knows no shared keys
        return int(2 * rows * heads * length * others * (width + value[-1]))

    def backward(_: Any, query: Any, key: Any, value: Any, *__: Any, **___: Any) -> int:
        return int(2.5 * forward(query, key, value))

    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return FlopCounterMode(display=False, custom_mapping={fused: forward, fused_backward: backward})


def tiny_backend(**options: Any) -> TorchBackend:
    """Return a backend on the exact fp64 model."""
    return TorchBackend(TinyLM(), **options)


def tiny_llama(dtype: torch.dtype = torch.float64, *, lora: Any = None, vocab: int = VOCAB, **options: Any) -> HFModel:
    """Return a random Llama of transformers; with LoRA, its matrices B are not zero."""
    pytest.importorskip("transformers", reason="a random Llama needs transformers (extra hf)")

    from pullback.backends.native.models.lora import add_lora

    model: nn.Module = random_llama(
        vocab_size=vocab, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, dtype=dtype, **TINY
    )
    if lora is not None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = add_lora(model, lora)
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    nn.init.normal_(p, std=0.1)
    return HFModel(model, **options)


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Return the relative difference of two gradients or weights, ``||a - b|| / ||b||``."""
    assert a.keys() == b.keys()
    flat_a, flat_b = (torch.cat([x[k].detach().double().reshape(-1) for k in sorted(a)]) for x in (a, b))
    return float((flat_a - flat_b).norm() / flat_b.norm().clamp(min=1e-300))


def weights_of(backend: TorchBackend) -> dict[str, Tensor]:
    """Return copies of the trained weights."""
    return {name: p.detach().clone() for name, p in backend.model.named_parameters() if p.requires_grad}


def accumulate(backend: TorchBackend, loss: Loss, calls: list[list[Datum]]) -> dict[str, Tensor]:
    for call in calls:
        backend.forward_backward(call, loss).result()
    return backend.gradients()


def cut(data: list[Datum], calls: int, order: list[int]) -> list[list[Datum]]:
    """Split pairs (which are groups too) over calls, in the given order."""
    pairs = [data[2 * p : 2 * p + 2] for p in order]
    size = -(-len(pairs) // calls)
    return [list(itertools.chain(*pairs[i : i + size])) for i in range(0, len(pairs), size)]


def nll(data: Sequence[Any], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy as a user would write it, a raw sum."""
    loss = torch.zeros(())
    for datum, lp in zip(data, logprobs, strict=True):
        loss = loss - torch.dot(lp, datum.loss_fn_inputs["weights"].to_torch().to(lp.dtype))
    return loss, {"nll": loss.item()}


def unweighted_nll(data: Sequence[Any], logprobs: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
    """The sum over all positions, whatever their weights."""
    return -torch.cat(list(logprobs)).sum(), {}
