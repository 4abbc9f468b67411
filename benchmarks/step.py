"""One DPO and one GRPO step, ours against TRL's trainer: same model, same batch, same reference log-probs, no generation.

Only forward, loss and backward are timed. TRL's trainers are built as their users build them and given padded batches.
DPO asks for TRL's padding-free mode; TRL 1.16 has it switched off and falls back to padding, which is then said. GRPO has
none there. Where TRL cannot be run only our side is shown, and why.
"""

from __future__ import annotations

import copy
import importlib
import pickle
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pullback import Datum, TorchBackend
from pullback.losses import DPO, GRPO, KL

from .models import batch, load
from .timing import Report, interleave, peak_bytes

__all__ = ["run"]

LENGTHS = [64, 512, 96, 384, 128, 448, 160, 320, 192, 256, 224, 480, 288, 352, 416, 512]


def prompt_length(datum: Datum) -> int:
    """Tokens before the first trained target; the target of position j is token j + 1."""
    weights = datum.loss_fn_inputs["weights"].to_torch()
    return int((weights == 0).sum()) + 1


def whole(datum: Datum) -> Tensor:
    """Prompt and completion, T + 1 tokens."""
    return torch.cat([datum.model_input.tokens, datum.loss_fn_inputs["target_tokens"].to_torch()[-1:]])


def pad(rows: list[Tensor], *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Return tokens and mask, [B, L]."""
    width = max(len(row) for row in rows)
    tokens, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        at = slice(width - len(row), width) if left else slice(0, len(row))
        tokens[i, at], mask[i, at] = row, 1
    return tokens, mask


def dpo_inputs(data: list[Datum]) -> dict[str, Tensor]:
    """What TRL's DPO trainer takes: chosen rows, then rejected rows."""
    ordered = [*data[0::2], *data[1::2]]
    tokens, mask = pad([whole(d) for d in ordered])
    completion = mask.clone()
    for row, datum in zip(completion, ordered, strict=True):
        row[: prompt_length(datum)] = 0
    sums = torch.stack([_sum(d, "ref_logprobs") for d in ordered])
    return {
        "input_ids": tokens,
        "attention_mask": mask,
        "completion_mask": completion,
        "ref_chosen_logps": sums[: len(data) // 2],
        "ref_rejected_logps": sums[len(data) // 2 :],
    }


def _sum(datum: Datum, key: str) -> Tensor:
    values, weights = (datum.loss_fn_inputs[k].to_torch() for k in (key, "weights"))
    return (values * weights).sum()


def grpo_inputs(data: list[Datum]) -> dict[str, Any]:
    """What TRL's GRPO trainer takes: prompts padded to the left, completions to the right."""
    cuts = [prompt_length(d) for d in data]
    prompts = pad([whole(d)[:cut] for d, cut in zip(data, cuts, strict=True)], left=True)
    completions = pad([whole(d)[cut:] for d, cut in zip(data, cuts, strict=True)])
    per_token = {}
    for name, key in (("old_per_token_logps", "logprobs"), ("ref_per_token_logps", "ref_logprobs")):
        values = torch.zeros(completions[0].shape)
        for i, (datum, cut) in enumerate(zip(data, cuts, strict=True)):
            found = datum.loss_fn_inputs[key].to_torch()[cut - 1 :]
            values[i, : len(found)] = found
        per_token[name] = values
    return {
        "prompt_ids": prompts[0],
        "prompt_mask": prompts[1],
        "completion_ids": completions[0],
        "completion_mask": completions[1],
        "advantages": torch.stack([d.loss_fn_inputs["advantages"].to_torch()[0] for d in data]),
        "num_items_in_batch": completions[1].sum(),
        **per_token,
    }


def trl_works(backend: TorchBackend, data: list[Datum], rows: int) -> dict[str, Callable[[], object]]:
    """TRL's training step on a copy of the model: forward, loss and backward in micro-batches of so many sequences."""
    import datasets
    import trl

    folder = tempfile.mkdtemp()
    common: dict[str, Any] = {
        "output_dir": folder,
        "gradient_checkpointing": False,
        "report_to": "none",
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
        "per_device_train_batch_size": rows,
    }
    model: Any = copy.deepcopy(backend.model)
    model.model.get_base_model().set_attn_implementation("sdpa")
    pairs = datasets.Dataset.from_list([{"prompt": "One", "chosen": " two", "rejected": " three"}] * rows)
    dpo = trl.DPOTrainer(
        model.model,
        args=trl.DPOConfig(precompute_ref_log_probs=True, max_length=None, padding_free=True, **common),
        train_dataset=pairs,
        processing_class=backend.tokenizer,
    )
    if dpo.padding_free:
        raise SystemExit(f"TRL {trl.__version__} has a padding-free DPO, which takes other batches than these")
    print(
        f"TRL {trl.__version__}: padding_free=True was asked for DPO and refused by the trainer; GRPO has no such mode"
    )
    grpo_model: Any = copy.deepcopy(backend.model)
    grpo_model.model.get_base_model().set_attn_implementation("sdpa")
    grpo = trl.GRPOTrainer(
        grpo_model.model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=trl.GRPOConfig(beta=0.04, loss_type="bnpo", num_generations=rows, **common),
        train_dataset=datasets.Dataset.from_list([{"prompt": "One"}]),
        processing_class=backend.tokenizer,
    )
    grpo.current_gradient_accumulation_steps = 1
    return {
        "TRL dpo": lambda: _trl_step(dpo, [dpo_inputs(part) for part in _parts(data, rows)]),
        "TRL grpo": lambda: _trl_step(grpo, [grpo_inputs(part) for part in _parts(data, rows)]),
    }


def why_no_trl(backend: TorchBackend) -> str | None:
    """Return what keeps TRL's trainers from running here, or None."""
    install = "pip install -e '.[peers]', in a virtual environment of its own"
    for name in ("trl", "datasets"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            return f"{name} cannot be imported ({error}): {install}"
    if backend.tokenizer is None:
        return "its trainers need a tokenizer, which the tiny model has not"
    import datasets

    try:
        datasets.Dataset.from_list([{"prompt": "One"}])
    except pickle.PicklingError as error:  # dill takes packages outside of the environment's prefix apart
        return f"datasets lies outside of this environment and cannot be pickled ({error}): {install}"
    return None


def _parts(data: list[Datum], rows: int) -> list[list[Datum]]:
    return [data[i : i + rows] for i in range(0, len(data), rows)]


def _trl_step(trainer: Any, parts: list[dict[str, Any]]) -> None:
    trainer.model.train()
    device = trainer.accelerator.device
    for part in parts:
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in part.items()}
        trainer.accelerator.backward(trainer.compute_loss(trainer.model, moved))
    trainer.model.zero_grad()


def run(arguments: Any) -> None:
    """Time both steps, and measure their memory."""
    backend = load(arguments.model, lora=8, token_budget=arguments.token_budget)
    data = batch(LENGTHS[: arguments.sequences], backend.vocab_size)
    tokens = sum(len(d.model_input) for d in data)
    known = {"dpo": DPO(beta=0.1), "grpo": GRPO(kl=KL(beta=0.04))}
    losses = {name: known[name] for name in arguments.losses.split(",")}

    def ours(name: str) -> None:
        backend.forward_backward(data, losses[name]).result()
        backend.discard_gradients()

    theirs: dict[str, Callable[[], object]] = {}
    reason = why_no_trl(backend)
    if reason is not None:
        print(f"TRL: {reason}; only our side is shown")
    else:
        for rows in arguments.rows:
            for name, work in trl_works(backend, data, rows).items():
                theirs[f"{name}, {rows} rows at once"] = work
    report = Report("step")
    for name in losses:
        works: dict[str, Callable[[], object]] = {f"pullback {name}": lambda name=name: ours(name)}  # type: ignore[misc]
        works |= {label: work for label, work in theirs.items() if f"TRL {name}" in label}
        times = interleave(works, arguments.rounds, arguments.clock)
        peaks = {label: peak_bytes(work) for label, work in works.items()}
        speed = {label: round(tokens / times.quantile(label, 5)) for label in works}
        facts = {"tokens": tokens, "per_second": speed}
        report.add(f"{arguments.model} LoRA {name}", times, f"pullback {name}", facts, peaks)
    report.close()
