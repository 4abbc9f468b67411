"""DPO through verl's FSDP engine, on all processes that start it: torchrun --nproc-per-node 8 verl_engine.py MODEL."""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
import torch.distributed as dist
from verl.trainer.config import CheckpointConfig
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
from verl.workers.engine import EngineRegistry

from pullback.backends import AdamParams
from pullback.backends.verl import VerlEngineBackend
from pullback.datums import Datum
from pullback.losses import DPO
from pullback.testing import example_datums


def build(path: str, attention: str, rank: int) -> Any:
    """Return verl's engine: a LoRA adapter on the model in a folder, micro-batches of at most 4096 tokens."""
    config = {"attn_implementation": attention}
    model = HFModelConfig(path=path, load_tokenizer=False, lora_rank=rank, override_config=config)
    sizes = FSDPEngineConfig(strategy="fsdp2", use_dynamic_bsz=True, max_token_len_per_gpu=4096)
    parts = (model, sizes, FSDPOptimizerConfig(lr=1e-4, total_training_steps=1), CheckpointConfig())
    engine = EngineRegistry.new("language_model", "fsdp2", *parts)
    engine.initialize()
    return engine


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--attention", default="flash_attention_2")
    parser.add_argument("--steps", type=int, default=20)
    chosen = parser.parse_args()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    # The same on every process: pairs of neighbours. Yours come from pullback.datums, and are seeded if they are drawn.
    data = example_datums([40, 30, 25, 60, 50, 20], seed=0, vocab_size=64)
    with VerlEngineBackend(build(chosen.model, chosen.attention, rank=8), checkpoint_dir="checkpoints") as backend:
        frozen = backend.reference().forward(data).result()  # the model without its adapter
        data = [
            Datum(datum.model_input, {**datum.loss_fn_inputs, "ref_logprobs": output["logprobs"]})
            for datum, output in zip(data, frozen.loss_fn_outputs, strict=True)
        ]
        for step in range(chosen.steps):
            loss = backend.forward_backward(data, DPO(beta=0.1)).result().metrics["loss_per_unit:mean"]
            norm = backend.optim_step(AdamParams(learning_rate=1e-3, grad_clip_norm=1.0)).result().metrics["grad_norm"]
            if dist.get_rank() == 0:
                print(f"step {step}: loss {loss:.4f}, gradient norm {norm:.4f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
