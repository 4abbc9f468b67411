"""A tiny model in verl's FSDP engine on a CPU, and the same one in a TorchBackend."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import peft
import torch
import torch.distributed as dist
import transformers
from other_trainers import verl_cpu  # noqa: F401  # registers the platform

from pullback.backends import AdamParams, HFModel, TorchBackend
from pullback.backends.verl import VerlEngineBackend
from pullback.datums import Datum
from pullback.testing import example_datums

with warnings.catch_warnings():  # of engines that are not installed
    warnings.simplefilter("ignore")
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

VOCABULARY = 64
Trained = Literal["full", "lora"]
_RANK = 4


def write_model(folder: Path, *, tied: bool = True) -> Path:
    """Write a random Llama of two layers, and an adapter that is not zero; return the folder."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=tied, **sizes, **heads)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=_RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_" in name:
                p.copy_(0.1 * torch.randn(p.shape))
    adapted.save_pretrained(folder / "adapter")
    return folder


def tiny_engine(folder: Path, trained: Trained, *, hf: dict[str, Any] | None = None, **options: Any) -> Any:
    """Return verl's engine, initialised in the process group that there is.

    Args:
        folder: of `write_model`.
        trained: all weights, or the adapter.
        hf: fields of the model's config to set.
        options: of verl's ``FSDPEngineConfig``.
    """
    adapter = {"lora_rank": _RANK, "lora_adapter_path": str(folder / "adapter")} if trained == "lora" else {}
    overrides = {"attn_implementation": "sdpa", **(hf or {})}
    model = HFModelConfig(path=str(folder), load_tokenizer=False, override_config=overrides, **adapter)
    exact = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    batches = {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": 2}
    given = {"strategy": "fsdp2", "mixed_precision": exact, "use_torch_compile": False, **batches, **options}
    optimizer = FSDPOptimizerConfig(lr=1e-3, total_training_steps=10)
    engine = FSDPEngineWithLMHead(model, FSDPEngineConfig(**given), optimizer, CheckpointConfig())
    engine.initialize()
    return engine


def make(folder: Path, trained: Trained = "full", **options: Any) -> VerlEngineBackend:
    """Return a backend on `tiny_engine`."""
    return VerlEngineBackend(tiny_engine(folder, trained, **options), checkpoint_dir=folder / "checkpoints")


@contextmanager
def lone_process(path: Path) -> Iterator[Path]:
    """Give the folder of a model, in a process group of this process alone: verl needs one."""
    dist.init_process_group("gloo", init_method=f"file://{path / 'store'}", rank=0, world_size=1)
    yield write_model(path / "model")
    dist.destroy_process_group()


def same_model(folder: Path, trained: Trained, **options: Any) -> TorchBackend:
    """Return the same model in a TorchBackend, in this process alone."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    if trained == "lora":
        model = peft.PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True)
    return TorchBackend(HFModel(model), mesh=None, **options)


def next_token_datums(lengths: Sequence[int] = (9, 5, 12, 3, 7, 11, 4, 8), **options: Any) -> list[Datum]:
    """Return datums whose targets are the tokens that follow in their inputs."""
    return example_datums(list(lengths), seed=3, vocab_size=VOCABULARY, **options)


def odd_gap(data: Sequence[Any], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    """A function that couples all datums, and depends on their order."""
    sums = torch.stack([x.sum() for x in logprobs])
    return (sums[0::2] - sums[1::2]).square().sum() / 100 + (torch.arange(len(sums)) * sums).mean(), {"gap": 1.0}


LOSSES: dict[str, Any] = {"cross_entropy": "num_loss_tokens", "grpo": None, "dpo": None, "orpo": None, "odd_gap": None}


def add(backend: Any, data: Sequence[Datum], loss: str) -> Any:
    """Return what a backend answers when the gradient of a loss is added."""
    if loss == "odd_gap":
        return backend.forward_backward_custom(data, odd_gap).result()
    return backend.forward_backward(data, loss).result()


def gap(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Return how far gradients or weights are from those of a TorchBackend, relative to their norm, all names being there."""
    assert {f"model.{name}" for name in ours} == set(theirs)
    differences = torch.cat([(ours[name] - theirs[f"model.{name}"]).flatten() for name in ours])
    return float(differences.norm() / torch.cat([x.flatten() for x in theirs.values()]).norm())


def weights(backend: Any) -> dict[str, torch.Tensor]:
    """Return copies of what a backend trains, whole."""
    module = backend.model if isinstance(backend, TorchBackend) else backend._engine.verl.module
    named = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    return {name: (p.full_tensor() if hasattr(p, "full_tensor") else p).clone() for name, p in named.items()}


def compare(ours: Any, theirs: TorchBackend, data: Sequence[Datum], loss: str) -> None:
    """Hold two calls and a clipped step to those of a TorchBackend: log-probs, gradients, divisor, norm and update."""
    for part in (data[:4], data[4:]):
        found, exact = add(ours, part, loss), add(theirs, part, loss)
        for mine, known in zip(found.loss_fn_outputs, exact.loss_fn_outputs, strict=True):
            seen = known["scored"].to_torch() if "scored" in known else torch.ones(len(known["logprobs"].data))
            difference = (mine["logprobs"].to_torch() - known["logprobs"].to_torch()) * seen
            assert float(difference.abs().max()) < 1e-5
        assert all(abs(found.metrics[key] - exact.metrics[key]) < 1e-4 for key in found.metrics)
    mode = LOSSES[loss]
    assert gap(ours.gradients(mode), theirs.gradients(mode)) < 1e-5
    before, norm = weights(theirs), float(torch.cat([g.flatten() for g in theirs.gradients(mode).values()]).norm())
    params = AdamParams(learning_rate=1e-3, eps=1e-3, weight_decay=0.01, grad_clip_norm=norm / 2)
    step, known = ours.optim_step(params, mode).result(), theirs.optim_step(params, mode).result()
    assert step.divided_by == known.divided_by
    assert abs(step.metrics["grad_norm"] / norm - 1) < 1e-5
    assert gap(weights(ours), weights(theirs)) < 1e-6
    change = torch.cat([(after - before[name]).flatten() for name, after in weights(theirs).items()]).norm()
    assert float(change) > 1e-3  # the step is one
