"""TorchBackend: the protocol on a PyTorch model, in the caller's thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, final

import torch
from torch import Tensor, nn

from ...datums.types import Datum, ModelInput, TensorData
from ...datums.validation import validate
from ...errors import BackendError, ClosedError, ConfigError, LossTypeError, MissingReferenceError, UnreadFailureError
from ...losses.base import Counts, Loss
from ...losses.metrics import wire_metrics
from ...losses.registry import get_loss
from ..futures import FinishedFuture
from ..protocol import CustomLoss, NormalizationMode
from ..types import (
    AdamParams,
    ForwardBackwardOutput,
    LedgerEntry,
    OptimStepOutput,
    Plan,
    Rollout,
    SamplingParams,
    SaveStateOutput,
    as_mapping,
)
from .adapter import ModelAdapter
from .batching import Layout, ScoreRequest, loss_units, micro_batches, request
from .gradient import Gradient, custom_gradient, custom_name, registered_gradient
from .optimizer import adam_step, new_optimizer
from .planning import choose_layout, describe_model, make_plan
from .probe import isolated_layouts, require_causal
from .reference import ReferenceView
from .sampling import draw
from .scoring import model_device, score, trainable
from .state import load_checkpoint, save_checkpoint
from .window import Window

__all__ = ["TorchBackend"]

T = TypeVar("T")
Positions = Literal["all", "trained"]


@final
class TorchBackend:
    """Trains and samples a PyTorch causal language model.

    Every operation runs in the caller's thread (under its autocast, its FLOP counters) and returns a finished future.

    Args:
        model: an ``nn.Module`` with ``hidden_states`` and ``head`` (see `ModelAdapter`); `HFModel` wraps transformers.
            Parameters with ``requires_grad`` are trained.
        reference: a second such module, frozen, for full tuning; a LoRA model is its own reference.
        tokenizer: kept as ``backend.tokenizer``; not used.
        token_budget: tokens of one forward, padding included; memory, never the result, depends on it.
        layout: ``packed`` (end to end in one row), ``padded`` (one per row), ``single`` or ``auto`` (the cheaper one
            that keeps sequences apart, as probed at load).
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
        layout: Layout | Literal["auto"] = "auto",
        max_length: int | None = None,
        checkpoint_dir: str | Path = "checkpoints",
        seed: int = 0,
    ) -> None:
        self.model = _adapter(model)
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.weights_version = 0
        self._parameters = trainable(model)
        if not self._parameters:
            raise BackendError("the model has no parameter with requires_grad; nothing can be trained")
        if token_budget < 1:
            raise ConfigError(f"token_budget must be at least 1 token, got {token_budget}")
        model.eval()  # no dropout: policy and reference must be the same function
        self._module, self._budget, self._directory = model, token_budget, Path(checkpoint_dir)
        self._reference = None if reference is None else _adapter(reference.eval().requires_grad_(False))
        self.vocab_size = int(self.model.head().weight.shape[0])
        require_causal(self.model, self.vocab_size)
        self._layouts = _layouts(layout, isolated_layouts(self.model, self.vocab_size))
        flops = float(getattr(model, "attention_flops_per_pair", 0.0))
        self._sizes = describe_model(model, self.model.head(), flops)
        self._window = Window(self._parameters)
        self._optimizer = new_optimizer(self._parameters)
        self._generator = torch.Generator(model_device(self.model)).manual_seed(seed)
        self._unread: list[BaseException] = []
        self._operations = 0
        self._closed = False

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
            options: of `TorchBackend`.

        Raises:
            MissingExtraError: transformers, peft or gguf is not installed.
        """
        from .hf import load_pretrained

        model, tokenizer = load_pretrained(
            path,
            gguf_file=gguf_file,
            lora=lora,
            dtype=dtype,
            device=device,
            gradient_checkpointing=gradient_checkpointing,
        )
        return cls(model, **{"tokenizer": tokenizer, **options})

    def forward(
        self, data: Sequence[Datum], loss_fn: str | Loss = "cross_entropy", loss_fn_config: Mapping[str, Any] | None = None
    ) -> FinishedFuture[ForwardBackwardOutput]:
        """Score all target tokens and evaluate a registered loss; no gradient."""
        return self._run("forward", lambda: self._forward(self.model, data, loss_fn, loss_fn_config))

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
            "forward_backward", lambda: self._registered(data, _loss(loss_fn, loss_fn_config), counts, "trained"), True
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
            return self._run("forward_backward_custom", lambda: self._registered(data, loss_fn, None, positions), True)
        return self._run("forward_backward_custom", lambda: self._custom(data, loss_fn, positions), True)

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
        return self._run("optim_step", lambda: self._step(params, grad_accumulation_normalization))

    def discard_gradients(self) -> None:
        """Empty the window, spoiled or not. Its failures count as read."""
        for failure in self._window.failures:
            self._read(failure)
        self._window.clear()

    def plan(self, loss_fn: str | Loss | CustomLoss, data: Sequence[Datum]) -> Plan:
        """Say what ``forward_backward`` (or ``_custom``, for a function) would do, before any work.

        Raises:
            DatumError: the data is wrong in itself. What is missing for this loss is refused in the plan instead.
        """
        if not isinstance(loss_fn, (str, Loss)):
            requests = self._check(data)
            layout, batches = self._batches(requests, [[i] for i in range(len(data))])
            reason = f"a function of all log-probs: one forward, its graphs kept; {self._layout_words()}"
            return make_plan(self._sizes, "single_pass", reason, layout, requests, batches)
        loss = _loss(loss_fn, None)
        missing = [key for key in loss.required_inputs if any(key not in d.loss_fn_inputs for d in data)]
        if missing:
            return make_plan(self._sizes, "refuse", self._missing_words(loss, missing), "single", [], [])
        requests = self._check(data, loss)
        layout, batches = self._batches(requests, loss_units(loss, data))
        reason = f"{loss.name} is registered ({loss.gradient_kind} kind): streamed by micro-batch; {self._layout_words()}"
        return make_plan(self._sizes, "native", reason, layout, requests, batches)

    def reference(self) -> ReferenceView:
        """Return a forward-only view of the frozen reference.

        Raises:
            MissingReferenceError: full tuning without a ``reference=`` model.
        """
        frozen = self._reference
        if frozen is not None:
            return ReferenceView(lambda *call: self._run("reference forward", lambda: self._forward(frozen, *call)))
        base_only = getattr(self.model, "base_only", None)
        if base_only is None or not self.model.is_lora:  # type: ignore[attr-defined]  # HFModel, known by base_only
            raise MissingReferenceError(
                "this backend trains all weights and was given no reference; pass reference=<a frozen copy of the model> to "
                "TorchBackend, or train with LoRA, whose base is the reference"
            )

        def forward(*call: Any) -> ForwardBackwardOutput:
            with base_only():
                return self._forward(self.model, *call)

        return ReferenceView(lambda *call: self._run("reference forward", lambda: forward(*call)))

    def sample(self, prompts: Sequence[ModelInput], n: int, params: SamplingParams) -> FinishedFuture[list[Rollout]]:
        """Draw ``n`` completions of each prompt, prompt-major; log-probs are those of the untempered policy."""
        return self._run("sample", lambda: draw(self.model, prompts, n, params, self._generator, self.weights_version))

    def save_state(self, name: str, *, overwrite: bool = False) -> FinishedFuture[SaveStateOutput]:
        """Write weights, optimizer, window, counters and random state to ``checkpoint_dir / name``, atomically."""
        return self._run("save_state", lambda: SaveStateOutput(str(save_checkpoint(self, name, overwrite))))

    def load_state(self, path: str | Path) -> FinishedFuture[None]:
        """Load weights only; the optimizer starts cold. Refused while the window holds gradients."""
        return self._run("load_state", lambda: load_checkpoint(self, Path(path), everything=False))

    def load_state_with_optimizer(self, path: str | Path) -> FinishedFuture[None]:
        """Load everything: the next step is what it would have been without the interruption."""
        return self._run("load_state_with_optimizer", lambda: load_checkpoint(self, Path(path), everything=True))

    def close(self) -> None:
        """Release the optimizer and gradients.

        Raises:
            UnreadFailureError: an operation failed and nobody read its error.
        """
        if self._closed:
            return
        self._closed = True
        unread, self._unread = self._unread, []
        self._window.clear()
        self._optimizer.state.clear()
        if unread:
            raise UnreadFailureError(
                f"{len(unread)} operation(s) failed and their futures were never read; the first: "
                f"{type(unread[0]).__name__}: {unread[0]}"
            ) from unread[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._unread = []  # the error on its way out matters more
        self.close()

    def _run(self, operation: str, work: Callable[[], T], gradient: bool = False) -> FinishedFuture[T]:
        if self._closed:
            raise ClosedError(f"{operation} on a backend that has been closed")
        try:
            return FinishedFuture(work(), operation=operation)
        except Exception as error:
            failure = error
        except BaseException as error:
            if gradient:
                self._window.failures.append(error)
            raise
        self._unread.append(failure)
        if gradient:
            self._window.failures.append(failure)
        return FinishedFuture(error=failure, on_read=lambda: self._read(failure), operation=operation)

    def _read(self, failure: BaseException) -> None:
        self._unread = [f for f in self._unread if f is not failure]
        self._window.failures = [f for f in self._window.failures if f is not failure]

    def _check(self, data: Sequence[Datum], loss: Loss | None = None, positions: Positions = "all") -> list[ScoreRequest]:
        required = () if loss is None else ("target_tokens", *loss.required_inputs)
        validate(
            data,
            required=required,
            optional=() if loss is None else loss.optional_inputs,
            vocab_size=self.vocab_size,
            max_length=self.max_length,
            known_keys=loss is not None,
            pairs=loss is not None and loss.gradient_kind == "pair",
        )
        return [request(datum, positions == "trained") for datum in data]

    def _batches(
        self, requests: Sequence[ScoreRequest], units: Sequence[Sequence[int]]
    ) -> tuple[Layout, list[list[int]]]:
        lengths = [r.length for r in requests]
        layout = choose_layout(self._sizes, self._layouts, lengths, self._budget)
        return layout, micro_batches(units, lengths, self._budget, layout)

    @torch.no_grad()
    def _forward(
        self,
        model: ModelAdapter,
        data: Sequence[Datum],
        loss_fn: str | Loss = "cross_entropy",
        config: Mapping[str, Any] | None = None,
    ) -> ForwardBackwardOutput:
        loss = _loss(loss_fn, config)
        requests = self._check(data, loss)
        layout, batches = self._batches(requests, [[i] for i in range(len(data))])
        found: dict[int, Tensor] = {}
        for batch in batches:
            packed = score(model, [requests[i] for i in batch], layout).cpu()
            found |= dict(zip(batch, packed.split([requests[i].length for i in batch]), strict=True))
        logprobs = [found[i] for i in range(len(data))]
        output = loss.evaluate(loss.batch(data, logprobs))
        return _output(requests, logprobs, wire_metrics(output.metrics))

    def _registered(
        self, data: Sequence[Datum], loss: Loss, counts: Counts | None, positions: Positions
    ) -> ForwardBackwardOutput:
        requests = self._check(data, loss, positions)
        self._window.admit(loss.name, loss.main_aggregation.denominator if counts is None else "none")
        layout, batches = self._batches(requests, loss_units(loss, data))
        with self._window.adding(), torch.enable_grad():
            gradient = registered_gradient(self.model, loss, data, requests, batches, layout, counts)
            self._window.require_finite(lambda: self._blame(requests, layout))
        self._record(loss.name, gradient, loss.normalization)
        return _output(requests, gradient.logprobs, gradient.metrics)

    def _custom(self, data: Sequence[Datum], function: CustomLoss, positions: Positions) -> ForwardBackwardOutput:
        if not callable(function):
            raise LossTypeError(f"loss_fn must be a function (data, logprobs_list) -> (loss, metrics), got {function!r}")
        requests = self._check(data, None, positions)
        self._window.admit(custom_name(function), "none")
        layout, batches = self._batches(requests, [[i] for i in range(len(data))])
        with self._window.adding(), torch.enable_grad():
            gradient = custom_gradient(self.model, function, data, requests, batches, layout)
            self._window.require_finite(lambda: self._blame(requests, layout))
        self._record(custom_name(function), gradient, "function")
        return _output(requests, gradient.logprobs, gradient.metrics)

    def _record(self, name: str, gradient: Gradient, fitting: str | None) -> None:
        self._operations += 1
        self._window.record(
            LedgerEntry(
                operation=self._operations,
                loss=name,
                datums=len(gradient.logprobs),
                tokens=gradient.tokens,
                sequences=gradient.sequences,
                denominator=gradient.denominator,
                count=gradient.count,
            ),
            fitting,
        )

    def _blame(self, requests: Sequence[ScoreRequest], layout: Layout) -> str:
        """Name the first datum whose own gradient is not finite."""
        parameters = list(self._parameters.values())
        for i, one in enumerate(requests):
            logprobs = score(self.model, [one], layout)
            found = torch.autograd.grad(logprobs.sum(), parameters, allow_unused=True)
            if any(g is not None and not bool(torch.isfinite(g).all()) for g in found):
                return f"datum {i}"
        return "no single datum (their sum overflows)"

    def _step(self, params: AdamParams, mode: NormalizationMode) -> OptimStepOutput:
        if not isinstance(params, AdamParams):
            raise ConfigError(f"optim_step needs AdamParams, got {type(params).__name__}")
        self._window.require_unspoiled()
        divisor = self._window.divisor(mode)
        ledger = tuple(self._window.ledger)
        if self._window.tokens == 0 or divisor.value == 0:
            self._window.clear()
            words = "empty window: no token has a gradient, so no step was made"
            return OptimStepOutput({"tokens": 0.0}, False, divisor.value, words, ledger)
        norm = adam_step(self._optimizer, self._parameters, params, divisor.value)
        self._window.clear()
        self.weights_version += 1
        metrics = {
            "grad_norm": norm,
            "divided_by": divisor.value,
            "learning_rate": params.learning_rate,
            "tokens": float(sum(e.tokens for e in ledger)),
            "sequences": float(sum(e.sequences for e in ledger)),
        }
        return OptimStepOutput(metrics, True, divisor.value, divisor.words, ledger)

    def _layout_words(self) -> str:
        if "packed" in self._layouts:
            return "sequences may be packed"
        return "packing is off (not allowed, or the model lets packed sequences see each other)"

    def _missing_words(self, loss: Loss, missing: Sequence[str]) -> str:
        words = f"missing required field {missing[0]!r}: {loss.name} needs {', '.join(missing)}"
        if "ref_logprobs" not in missing:
            return words
        try:
            self.reference()
        except MissingReferenceError as error:
            return f"{words}; {error}"
        return f"{words}; fill them in by with_reference(data, backend.reference())"


def _adapter(model: Any) -> ModelAdapter:
    if not isinstance(model, nn.Module) or not isinstance(model, ModelAdapter):
        raise BackendError(
            f"model must be an nn.Module with hidden_states(tokens, positions) and head(), got {type(model).__name__}; "
            "a transformers model is wrapped by HFModel(model), or loaded by TorchBackend.from_pretrained"
        )
    return model


def _layouts(asked: Layout | Literal["auto"], isolated: Sequence[Layout]) -> Sequence[Layout]:
    from ...errors import LeakyModelError

    if asked == "auto":
        return isolated
    if asked not in ("packed", "padded", "single"):
        raise ConfigError(f"layout must be auto, packed, padded or single, got {asked!r}")
    if asked not in isolated:
        raise LeakyModelError(
            f"layout={asked!r}: this model lets sequences of one forward see each other; it keeps them apart in: "
            f"{', '.join(isolated)}; use one of these, or layout='auto'"
        )
    return (asked,)


def _loss(given: str | Loss, config: Mapping[str, Any] | None) -> Loss:
    if isinstance(given, str):
        return get_loss(given, as_mapping(config))
    if isinstance(given, Loss):
        if config:
            raise ConfigError(f"{given.name} was given as an object and carries its own hyperparameters; drop {dict(config)}")
        return given
    raise LossTypeError(
        f"loss_fn must be a registered name or a Loss, got {type(given).__name__}; functions go to forward_backward_custom"
    )


def _output(
    requests: Sequence[ScoreRequest], logprobs: Sequence[Tensor], metrics: Mapping[str, float]
) -> ForwardBackwardOutput:
    outputs = []
    for one, values in zip(requests, logprobs, strict=True):
        output = {"logprobs": TensorData(values.detach())}
        if not bool(one.needed.all()):
            output["scored"] = TensorData(one.needed.to(torch.float32))
        outputs.append(output)
    return ForwardBackwardOutput(outputs, metrics)
