"""verl's engine as one of ours: two passes, one that scores and one that takes cotangents back, on all processes alike."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from ...errors import BackendError, CheckpointError, MissingReferenceError, NonFiniteError, UnsupportedError
from ..calls.prepared import PreparedCall
from ..engine import Call, Engine, EngineLimits, Gradient, Scorer
from ..native.accumulator import Accumulator
from ..native.checkpoints.files import new_folder
from ..native.distributed.agreement.agreement import Agreement
from ..native.distributed.agreement.exchange import agreed_cotangents, require_finite_gradients, require_same_call
from ..native.distributed.checkpoints.save import shared_folder
from ..native.distributed.fsdp import forget_pass
from ..native.distributed.ranks import Ranks
from ..native.distributed.schedule import Share, share_out
from ..native.dtensors import full
from ..native.execution.forward import trainable
from ..native.execution.gradient import require_finite_logprobs, summary
from ..native.models.facts.model_facts import read_facts, text_config
from ..operations.normalization import Divisor, Ledger
from ..types import AdamParams, Plan
from .batches import batch_settings, require_expressible, to_batch

__all__ = ["VerlEngine"]

_MANIFEST = "pullback.json"


@final
class VerlEngine(Engine):
    """An initialised engine of verl's; for the arguments see `VerlEngineBackend`."""

    def __init__(self, verl: Any, directory: Path, timeout: float | None) -> None:
        _require_trainable(verl)
        self.verl, self.directory, self.settings = verl, directory, batch_settings(verl)
        config = text_config(verl.model_config.hf_config)
        self._facts = read_facts(config)
        room = self.settings.get("max_token_len_per_gpu", math.inf) - 1  # a sequence goes there with its last target
        longest = min(room, self._facts.max_length or math.inf)
        self.limits = EngineLimits(
            config.vocab_size,
            None if math.isinf(longest) else int(longest),
            tempers=not self.settings["use_fused_kernels"],  # which take one temperature for all
        )
        self.accumulator = Accumulator(trainable(verl.module))
        self.accumulator.clear()
        limit = None if timeout is None else timedelta(seconds=timeout)
        group = dist.new_group(backend="gloo", timeout=limit)  # apart from verl's, whose order it must not disturb
        assert group is not None
        self._ranks = Ranks(dist.get_rank(), dist.get_world_size(), group)
        self._agreement = Agreement(self._ranks)
        place = [verl.get_data_parallel_rank(), int(verl.is_mp_src_rank_with_outputs())]
        self._places: list[list[int]] = self._ranks.gather(torch.tensor(place)).tolist()
        self._half_stepped = False
        with self._running(verl.eval_mode()):  # FSDP notes here what is trained, before an adapter is ever switched off
            verl.infer_batch(to_batch([], [], self.settings.get("micro_batch_size_per_gpu", 1), self.settings, {}))

    @contextmanager
    def operation(self, call: Call) -> Iterator[None]:
        if self._half_stepped and not call.operation.startswith("load_state"):
            raise BackendError("the last optimizer step failed half-way; load the last checkpoint")
        with self._agreement.operation(call.operation):
            yield

    def score(self, call: PreparedCall) -> list[Tensor]:
        require_expressible(call)
        require_same_call(self._agreement, call, f"step {self.weights_version}")
        share, own, batch = self._dealt(call, {})
        with self._running(self.verl.eval_mode()):
            rows = self.verl.infer_batch(batch)["model_output"]["log_probs"].unbind()
        found = {i: row[:-1] for i, row in zip(own, rows, strict=False)}
        return share.gather({i: found[i] for i in share.own}, call, torch.float32)

    def accumulate(self, call: PreparedCall) -> Gradient:
        scored = dict(enumerate(self.score(call)))
        require_finite_logprobs(scored, call.requests)
        found = agreed_cotangents(self._agreement, self._ranks, call, [*scored.values()])
        _, _, batch = self._dealt(call, found.by_datum)
        mode = self._running(self.verl.train_mode(zero_grad_on_exit=False))
        with self.accumulator.adding(), torch.enable_grad(), mode:
            self._switch_dropout_off()
            self.verl.forward_backward_batch(batch, self._surrogate)
            cause = f"the backward of {call.name} through the model"
            require_finite_gradients(self._ranks, self.accumulator.gradients, cause)
        return summary(call, [found], scored, [])

    def step(self, params: AdamParams, divisor: Divisor) -> Mapping[str, float]:
        self._agreement.meet("settings of the step", f"{self.weights_version} {params} {divisor.value}".encode())
        gradients = self.accumulator.gradients
        require_finite_gradients(self._ranks, gradients, "the sum of calls that are finite one by one")
        norm = float(full(torch.nn.utils.get_total_norm(gradients.values()))) / divisor.value
        if not norm < 1e19:  # its square overflows
            words = f"the norm of the gradient is {norm}, though each number is finite; nothing has changed"
            raise NonFiniteError(words)
        for group in self.verl.optimizer.param_groups:
            group |= {"lr": params.learning_rate, "betas": (params.beta1, params.beta2)}
            group |= {"eps": params.eps, "weight_decay": params.weight_decay}
        self.verl.optimizer_config.clip_grad = params.grad_clip_norm or math.inf
        self._half_stepped = True
        with self._running(self.verl.train_mode()):
            torch._foreach_div_([*gradients.values()], divisor.value)
            norm = float(self.verl.optimizer_step())
        self._agreement.meet("step")
        self._half_stepped = False
        if not math.isfinite(norm):  # verl prints a warning and goes on
            raise NonFiniteError(f"the norm of the gradient is {norm}; verl made no step and dropped the gradients")
        self.weights_version += 1
        return {"grad_norm": norm}

    def clear(self) -> None:
        self.accumulator.clear()

    def gradients(self) -> Mapping[str, Tensor]:
        return {name: full(gradient) for name, gradient in self.accumulator.gradients.items()}

    def plan(self, call: PreparedCall) -> Plan:
        try:
            require_expressible(call)
        except UnsupportedError as error:
            return Plan("refuse", str(error))
        tokens = sum(length + 1 for length in call.lengths)
        reason = "verl takes a loss before it has log-probs, so that every gradient costs a second forward"
        return Plan("two_passes", reason, tokens=tokens, scored=tokens, recomputed=tokens)

    def reference(self) -> Scorer:
        if not self.verl.model_config.lora_rank:
            words = "this engine trains all weights; put ref_logprobs into the datums, or train with LoRA"
            raise MissingReferenceError(words)

        def score_base(call: PreparedCall) -> list[Tensor]:
            with self.verl.disable_adapter():
                return self.score(call)

        return score_base

    def save(self, name: str, overwrite: bool, ledger: Ledger) -> str:
        if ledger.entries:
            words = "verl's checkpoints hold no accumulated gradients; call optim_step or discard_gradients()"
            raise UnsupportedError(words)
        final = new_folder(self.directory, name, overwrite)
        known = {"weights_version": self.weights_version, "operations": ledger.operations, "ranks": self._ranks.size}
        self._agreement.meet("checkpoint", text=f"{final} {known}")
        with shared_folder(self._ranks, self._agreement, final) as folder:
            self.verl.save_checkpoint(str(folder))
            if self._ranks.rank == 0:
                (folder / _MANIFEST).write_text(json.dumps(known))
        return str(final)

    def load(self, path: str, everything: bool) -> Ledger:
        try:
            known = json.loads((Path(path) / _MANIFEST).read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} is no checkpoint of this backend: {error}") from error
        if known["ranks"] != self._ranks.size:
            words = f"{path} is of {known['ranks']} processes, here are {self._ranks.size}; verl needs as many"
            raise CheckpointError(words)
        self._agreement.meet("checkpoint", path.encode())
        manager, self._half_stepped = self.verl.checkpoint_manager, True
        kept = manager.checkpoint_load_contents
        manager.checkpoint_load_contents = ["model", "optimizer", "extra"] if everything else ["model"]
        try:
            self.verl.load_checkpoint(path, del_local_after_load=False)
        finally:
            manager.checkpoint_load_contents = kept
        if not everything:
            self.verl.optimizer.state.clear()
        self._agreement.meet("loaded")
        self.clear()
        self.weights_version, self._half_stepped = int(known["weights_version"]), False
        return Ledger(operations=known["operations"] if everything else 0)

    def close(self, timeout: float | None = None) -> None:
        self.clear()

    def _dealt(self, call: PreparedCall, cotangents: Mapping[int, Tensor]) -> tuple[Share, list[int], Any]:
        """Return who returns which datums, those that this process computes, and verl's batch of them."""
        units = [[i] for i in range(len(call.data))]
        dealt = [[i for (i,) in part] for part in share_out(units, call.lengths, self.verl.get_data_parallel_size())]
        rows, step = max(map(len, dealt)), self.settings.get("micro_batch_size_per_gpu", 1)
        members = [dealt[at] if returns else [] for at, returns in self._places]
        own = dealt[self._places[self._ranks.rank][0]]
        batch = to_batch(call.requests, own, -(-rows // step) * step, self.settings, cotangents)
        return Share([], "packed", members, self._ranks, in_step=True), own, batch

    @contextmanager
    def _running(self, mode: AbstractContextManager[None]) -> Iterator[None]:
        """Run a pass of verl's, in which processes wait for each other: where one has failed, they are at different places."""
        try:
            with self._agreement.together("pass of verl's") if self._ranks.size > 1 else nullcontext(), mode:
                yield
        except BaseException:
            forget_pass(self.verl.module)
            raise
        finally:
            for unit in self.verl.module.modules():
                if isinstance(unit, FSDPModule):
                    unit.reshard()  # or the next step would not be seen by weights that are still gathered

    def _surrogate(self, model_output: Any, data: Any, dp_group: Any = None) -> tuple[Tensor, dict[str, Any]]:
        """Return sum(cotangent * logprob), whose gradient is the loss's; times the processes over which verl takes a mean."""
        cotangents = data["cotangent"].values()
        pulled = torch.where(cotangents != 0, model_output["log_probs"].values().float() * cotangents, 0.0)
        return pulled.sum() * self.verl.get_data_parallel_size(), {}

    def _switch_dropout_off(self) -> None:
        """Evaluate in training mode too, but for layers that run again in the backward and drop nothing."""
        self.verl.module.eval()
        for layer in self.verl.module.modules():
            layer.training = bool(getattr(layer, "gradient_checkpointing", False)) and not self._facts.dropouts


def _require_trainable(verl: Any) -> None:
    """Raise `UnsupportedError` if the engine's gradients are not what they seem, or its step is not ours to name."""
    optimizer, config = verl.optimizer, text_config(verl.model_config.hf_config)
    auxiliary = "config.output_router_logits adds an auxiliary loss, which it drops"
    reasons = {
        "its module is not sharded by FSDP2 (strategy fsdp2)": not isinstance(verl.module, FSDPModule),
        f"its optimizer is {type(optimizer).__name__}, not torch.optim.AdamW": type(optimizer) is not torch.optim.AdamW,
        "float16 scales the loss; use bfloat16": getattr(verl, "scaler", None) is not None,
        auxiliary: getattr(config, "output_router_logits", False),
    }
    for reason, applies in reasons.items():
        if applies:
            raise UnsupportedError(f"{type(verl).__name__} cannot train what losses on log-probs say: {reason}")
