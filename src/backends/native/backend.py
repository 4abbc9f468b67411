"""TorchBackend: the protocol on a PyTorch model, in the caller's thread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, final

import torch
from torch import Tensor, nn

from ...datums.types import Datum, ModelInput
from ...losses.base import Counts, Loss
from ..arguments import as_loss
from ..futures import FinishedFuture
from ..operations import Operations
from ..protocol import CustomLoss, NormalizationMode
from ..reference import ReferenceView
from ..types import AdamParams, ForwardBackwardOutput, OptimStepOutput, Plan, Rollout, SamplingParams, SaveStateOutput
from .checkpoint import load_checkpoint, save_checkpoint
from .engine import Engine, Positions, as_causal_lm
from .execution.batching import Layout
from .execution.deferred_backward import Overflow
from .execution.retained import HeldForward
from .plan import plan_call
from .reference import reference_forward
from .sampling import draw

__all__ = ["TorchBackend"]


@final
class TorchBackend:
    """Trains and samples a PyTorch causal language model.

    Every operation runs in the caller's thread (under its autocast, its FLOP counters) and returns a finished future.

    Args:
        model: an ``nn.Module`` with ``hidden_states`` and ``head`` (see `CausalLM`); `HFModel` wraps transformers.
            Parameters with ``requires_grad`` are trained.
        reference: a second such module, frozen, for full tuning; a LoRA model is its own reference.
        tokenizer: kept as ``backend.tokenizer``; not used.
        token_budget: tokens of one forward, padding included; memory, never the result, depends on it.
        activation_budget: bytes that the graphs of one call may hold together; default half of what is free.
        overflow: what happens to graphs beyond it: ``recompute`` (run again) or ``offload`` (to CPU memory).
        layout: ``packed`` (end to end in one row), ``forked`` (the same, a beginning that several share runs once),
            ``padded`` (one per row), ``single`` or ``auto`` (the cheapest that keeps sequences apart, as probed at load).
        max_length: longest datum, tokens; None = no limit.
        checkpoint_dir: where `save_state` writes.
        seed: of the sampling generator.

    Raises:
        LeakyModelError: the model sees the future, or mixes sequences in the layout that was asked for.
        BackendError: nothing is trainable.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        reference: nn.Module | None = None,
        tokenizer: Any = None,
        token_budget: int = 4096,
        activation_budget: float | None = None,
        overflow: Overflow = "recompute",
        layout: Layout | Literal["auto"] = "auto",
        max_length: int | None = None,
        checkpoint_dir: str | Path = "checkpoints",
        seed: int = 0,
    ) -> None:
        self.tokenizer = tokenizer
        self._engine = Engine(model, token_budget, activation_budget, overflow, layout, max_length, seed)
        self._operations = Operations(self._engine.window)
        self._run = self._operations.run
        self._directory = Path(checkpoint_dir)
        self._reference = None if reference is None else as_causal_lm(reference.eval().requires_grad_(False))

    @property
    def model(self) -> nn.Module:
        """The model, as it was given."""
        return self._engine.module

    @property
    def vocab_size(self) -> int:
        """V: rows of the head."""
        return self._engine.vocab_size

    @property
    def weights_version(self) -> int:
        """Optimizer steps so far."""
        return self._engine.weights_version

    def gradients(self, grad_accumulation_normalization: NormalizationMode = None) -> dict[str, Tensor]:
        """Return the window's gradient by parameter name, divided as ``optim_step`` would divide it (copies)."""
        divisor = self._engine.window.ledger.divisor(grad_accumulation_normalization).value or 1.0
        found = {name: p.grad for name, p in self._engine.parameters.items()}
        return {name: gradient / divisor for name, gradient in found.items() if gradient is not None}

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        gguf_file: str | None = None,
        lora: Any = None,
        dtype: str | torch.dtype = "float32",
        device: str | torch.device | None = None,
        gradient_checkpointing: bool = False,
        compile: str | None = None,
        **options: Any,
    ) -> TorchBackend:
        """Load a transformers model (extra ``hf``).

        Args:
            path: folder or hub name that ``AutoModelForCausalLM`` understands; with ``gguf_file`` the folder it lies in.
            gguf_file: name of a GGUF file; it is converted to safetensors once and cached.
            lora: rank, or a ``peft.LoraConfig``; None trains every parameter.
            dtype: of the base weights; LoRA adapters are always fp32.
            device: default: a GPU where there is one.
            gradient_checkpointing: recompute activations in the backward.
            compile: a backend of ``torch.compile`` for the trunk, e.g. ``inductor``.
            options: of `TorchBackend`.

        Raises:
            MissingExtraError: transformers, peft or gguf is not installed.
        """
        from .models.load import load_pretrained

        model, tokenizer = load_pretrained(
            path,
            gguf_file=gguf_file,
            lora=lora,
            dtype=dtype,
            device=device,
            gradient_checkpointing=gradient_checkpointing,
            compile=compile,
        )
        return cls(model, **{"tokenizer": tokenizer, **options})

    def forward(
        self,
        data: Sequence[Datum],
        loss_fn: str | Loss = "cross_entropy",
        loss_fn_config: Mapping[str, Any] | None = None,
    ) -> FinishedFuture[ForwardBackwardOutput]:
        """Score all target tokens and evaluate a registered loss; no gradient."""
        return self._run("forward", lambda: self._engine.forward(self._engine.model, data, loss_fn, loss_fn_config))

    def forward_backward(
        self,
        data: Sequence[Datum],
        loss_fn: str | Loss,
        loss_fn_config: Mapping[str, Any] | None = None,
        *,
        counts: Counts | None = None,
    ) -> FinishedFuture[ForwardBackwardOutput]:
        """Add the gradient of a registered loss to the window.

        Args:
            data: whole units (pairs, groups).
            loss_fn: registered name, or a loss.
            loss_fn_config: hyperparameters, with a name only.
            counts: totals of the whole step by denominator, e.g. ``{"tokens": 18231}``: divide now, not at
                ``optim_step``. Needed where two denominators meet in one window.

        Returns:
            Log-probs (0.0 with a ``scored`` mask where untrained positions were skipped) and metrics.
        """
        return self._run(
            "forward_backward",
            lambda: self._engine.registered(data, as_loss(loss_fn, loss_fn_config), counts, "trained"),
            True,
        )

    def forward_backward_custom(
        self, data: Sequence[Datum], loss_fn: CustomLoss, *, positions: Positions = "all"
    ) -> FinishedFuture[ForwardBackwardOutput]:
        """Add the gradient of any function of the log-probs to the window, in one forward.

        Args:
            data: datums; one without ``target_tokens`` is scored on its own next tokens.
            loss_fn: ``(data, logprobs_list) -> (scalar loss, metrics)``; gets fp32 CPU leaves (fp64 of an fp64 model). A
                registered loss works too, and is then divided at ``optim_step`` like any other.
            positions: ``trained`` skips positions of weight 0; they read 0.0.
        """
        if isinstance(loss_fn, Loss):
            registered = loss_fn
            return self._run(
                "forward_backward_custom", lambda: self._engine.registered(data, registered, None, positions), True
            )
        return self._run("forward_backward_custom", lambda: self._engine.custom(data, loss_fn, positions), True)

    def hold(self, data: Sequence[Datum], *, budget: float | None = None) -> FinishedFuture[HeldForward]:
        """Score all target tokens and keep the graphs, for a loss that is computed elsewhere.

        Args:
            data: datums; one without ``target_tokens`` is scored on its own next tokens.
            budget: bytes that the graphs may hold; those beyond run again. Default: the activation budget.
        """
        return self._run("hold", lambda: self._engine.hold(data, budget))

    def pull(
        self, held: Mapping[HeldForward, Sequence[int]], data: Sequence[Datum], loss_fn: str | Loss
    ) -> FinishedFuture[ForwardBackwardOutput]:
        """Add the gradient of a registered loss on forwards that `hold` made; each serves once.

        Args:
            held: which datum of ``data`` each of a forward's is.
            data: the datums, with the inputs of the loss; one that no forward holds is scored now.
            loss_fn: registered name, or a loss.

        Raises:
            BackendError: the weights have changed since.
        """
        return self._run("pull", lambda: self._engine.pull(held, data, as_loss(loss_fn, None)), True)

    def optim_step(
        self, params: AdamParams, grad_accumulation_normalization: NormalizationMode = None
    ) -> FinishedFuture[OptimStepOutput]:
        """Divide the window's gradient once, clip it, make one AdamW step and open a new window.

        Args:
            params: hyperparameters of this step.
            grad_accumulation_normalization: None: the losses' own deferred denominator, if any. ``num_loss_tokens``,
                ``num_sequences``: tokens, or sequences, with a non-zero cotangent, for raw sums. ``auto``: what the
                registered losses declare.

        Raises:
            PrecedingOperationFailed: a gradient operation failed and its error was not read.
            DoubleNormalizationError: a normalising mode on top of a mean loss.
            NonFiniteError: the gradient is NaN or inf; nothing changed.
        """
        return self._run("optim_step", lambda: self._engine.step(params, grad_accumulation_normalization))

    def discard_gradients(self) -> None:
        """Empty the window, spoiled or not. Its failures count as read."""
        for failure in list(self._engine.window.failures):
            self._operations.read(failure)
        self._engine.window.clear()

    def plan(self, loss_fn: str | Loss | CustomLoss, data: Sequence[Datum]) -> Plan:
        """Say what ``forward_backward`` (or ``_custom``, for a function) would do, before any work.

        Raises:
            DatumError: the data is wrong in itself. What is missing for this loss is refused in the plan instead.
        """
        return plan_call(self._engine, loss_fn, data, self.reference)

    def reference(self) -> ReferenceView:
        """Return a forward-only view of the frozen reference.

        Raises:
            MissingReferenceError: full tuning without a ``reference=`` model.
        """
        forward = reference_forward(self._engine, self._reference)
        return ReferenceView(lambda *call: self._run("reference forward", lambda: forward(*call)))

    def sample(self, prompts: Sequence[ModelInput], n: int, params: SamplingParams) -> FinishedFuture[list[Rollout]]:
        """Draw ``n`` completions of each prompt, prompt-major; log-probs are those of the untempered policy."""
        return self._run("sample", lambda: self._sample(prompts, n, params))

    def save_state(self, name: str, *, overwrite: bool = False) -> FinishedFuture[SaveStateOutput]:
        """Write weights, optimizer, window, counters and random state to ``checkpoint_dir / name``, atomically."""
        return self._run("save_state", lambda: save_checkpoint(self._engine, self._directory, name, overwrite))

    def save_weights(
        self, name: str, *, overwrite: bool = False, folder: str | Path | None = None
    ) -> FinishedFuture[SaveStateOutput]:
        """Write the weights alone, to sample from or to start from (default folder: ``checkpoint_dir``), atomically."""
        root = self._directory if folder is None else Path(folder)
        return self._run("save_weights", lambda: save_checkpoint(self._engine, root, name, overwrite, everything=False))

    def load_state(self, path: str | Path) -> FinishedFuture[None]:
        """Load weights only; the optimizer starts cold. Refused while the window holds gradients."""
        return self._run("load_state", lambda: load_checkpoint(self._engine, Path(path), everything=False))

    def load_state_with_optimizer(self, path: str | Path) -> FinishedFuture[None]:
        """Load everything: the next step is what it would have been without the interruption."""
        return self._run(
            "load_state_with_optimizer", lambda: load_checkpoint(self._engine, Path(path), everything=True)
        )

    def close(self) -> None:
        """Release the optimizer and gradients.

        Raises:
            UnreadFailureError: an operation failed and nobody read its error.
        """
        if self._operations.closed:
            return
        self._engine.window.clear()
        self._engine.optimizer.reset()
        self._operations.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._operations.forgive()  # the error on its way out matters more
        self.close()

    def _sample(self, prompts: Sequence[ModelInput], n: int, params: SamplingParams) -> list[Rollout]:
        engine = self._engine
        return draw(engine.model, prompts, n, params, engine.generator, engine.weights_version)
