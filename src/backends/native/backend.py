"""TorchBackend: the protocol on a PyTorch model, in the caller's thread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, final

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ...datums.types import Datum
from ...deprecation import replaced
from ...losses.base import Loss
from ..base import Backend
from ..calls.losses import loss_name
from ..engine import Call
from ..operations.futures import Answer, Future
from ..operations.runner import sized
from ..protocol import CustomLoss
from ..types import ForwardBackwardOutput, SaveStateOutput
from .causal_lm import as_causal_lm
from .checkpoints.checkpoint import checkpoint_bytes
from .checkpoints.export import Export
from .distributed.ranks import find_mesh
from .engine import NativeEngine
from .execution.batching import Layout
from .execution.forward import model_device
from .execution.memory import Overflow
from .execution.retained import RetainedForward
from .given_cotangents import given_loss

if TYPE_CHECKING:
    from .distributed.engine import DistributedEngine

__all__ = ["TorchBackend"]


@final
class TorchBackend(Backend):
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
        layout: ``packed`` (end to end in one row), ``forked`` (the same, a prefix that several share runs once),
            ``padded`` (one per row), ``single`` or ``auto`` (the cheapest that keeps sequences apart, as probed at load).
        max_length: longest datum, tokens; None = the context that the model was made for, if its config names one.
        checkpoint_dir: where `save_state` writes.
        seed: of the sampling generator.
        mesh: the processes that train the model together, each of which is given the same data and returns the same results:
            ``auto`` (all that ``torchrun`` started), None (this one alone), or a ``DeviceMesh`` of one dimension (shards) or
            two (replicas, shards). See docs/distributed.md.
        reshard: whether each layer's weights are freed after use and gathered again; ``auto``: only where memory asks for it.
        shard_frozen: whether weights that are not trained are spread over the processes too; False: each process keeps them
            whole, as they were given, so that the adapters of several backends can share them.
        vocab_parallel: whether each process holds some rows of the head, on which all score together, and never the whole;
            ``auto``: only where memory asks for it. A head of its own is needed, without an adapter.
        timeout: seconds that a process waits for the others before it gives up; None: PyTorch's default.

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
        mesh: DeviceMesh | Literal["auto"] | None = "auto",
        reshard: bool | Literal["auto"] = "auto",
        shard_frozen: bool = True,
        vocab_parallel: bool | Literal["auto"] = "auto",
        timeout: float | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        build = partial(
            NativeEngine,
            model,
            reference=reference,
            token_budget=token_budget,
            activation_budget=activation_budget,
            overflow=overflow,
            layout=layout,
            max_length=max_length,
            checkpoint_dir=Path(checkpoint_dir),
            seed=seed,
        )
        found = find_mesh(mesh, model_device(as_causal_lm(model)), timeout)
        self._everywhere: NativeEngine | DistributedEngine
        if found is None:
            self._everywhere = self._native = build()
        else:
            from .distributed.start import distributed_engine

            options: dict[str, Any] = {"reshard": reshard, "shard_frozen": shard_frozen, "timeout": timeout}
            options["vocab_parallel"] = vocab_parallel
            engine = distributed_engine(model, reference, found, build=build, **options)
            self._everywhere, self._native = engine, engine.local  # of all processes, and this one's part of it
        super().__init__(self._everywhere)

    @property
    def model(self) -> nn.Module:
        """The model, as it was given."""
        return self._native.module

    @property
    def vocab_size(self) -> int:
        """V: rows of the head."""
        return self._native.vocab_size

    def layouts(self, length: int | None = None) -> tuple[Layout, ...]:
        """Return the layouts that keep sequences of one forward apart, cheapest first.

        Args:
            length: tokens of the longest sequence; None: of any.
        """
        return self._native.scheduler.layouts.allowed(length)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        gguf_file: str | None = None,
        lora: Any = None,
        base: str | Path | None = None,
        dtype: str | torch.dtype = "float32",
        device: str | torch.device | None = None,
        gradient_checkpointing: bool = False,
        compile: str | None = None,
        **options: Any,
    ) -> TorchBackend:
        """Load a transformers model (extra ``hf``).

        Args:
            path: folder or hub name that ``AutoModelForCausalLM`` understands, or of an adapter, which is loaded on its base
                and trained on; with ``gguf_file`` the folder it lies in.
            gguf_file: name of a GGUF file; it is converted to safetensors once and cached.
            lora: rank (see `LoraChoice` for what else holds), a ``peft.LoraConfig`` or a dict of its fields, or the folder of
                a checkpoint, whose adapter's settings are used; None trains every parameter.
            base: the model that an adapter is on; default: the one that its config names.
            dtype: of the base weights; LoRA adapters are always fp32.
            device: default: a GPU where there is one.
            gradient_checkpointing: recompute activations in the backward.
            compile: a backend of ``torch.compile`` for the base model, e.g. ``inductor``.
            options: of `TorchBackend`.

        Raises:
            MissingExtraError: transformers, peft or gguf is not installed.
            CheckpointError: a file or a weight is missing, or the adapter is on another model.
            UnsupportedError: not a causal language model, or one that cannot be trained so.
        """
        from .models.load import load_pretrained

        model, tokenizer = load_pretrained(
            path,
            gguf_file=gguf_file,
            lora=lora,
            base=base,
            dtype=dtype,
            device=device,
            gradient_checkpointing=gradient_checkpointing,
            compile=compile,
        )
        return cls(model, **{"tokenizer": tokenizer, **options})

    def forward_retain(self, data: Sequence[Datum], *, budget: float | None = None) -> Future[RetainedForward]:
        """Score all target tokens and retain the graphs, for a loss that is computed elsewhere.

        Args:
            data: datums; one without ``target_tokens`` is scored on its own next tokens.
            budget: bytes that the graphs may hold; those beyond run again. Default: the activation budget.
        """

        def work() -> Answer[RetainedForward]:
            return self._everywhere.retain(self._prepare(data, None), budget)

        return self._run(Call("forward_retain", datums=sized(data)), work)

    def backward(
        self,
        retained: Mapping[RetainedForward, Sequence[int]],
        data: Sequence[Datum],
        loss_fn: str | Loss | CustomLoss | None = None,
        *,
        cotangents: Sequence[Tensor] | None = None,
    ) -> Future[ForwardBackwardOutput]:
        """Accumulate a gradient on forwards that `forward_retain` made; each serves once.

        Args:
            retained: which datum of ``data`` each of a forward's is.
            data: the datums, with the inputs of the loss; one that no forward has is scored now.
            loss_fn: registered name, a loss, or a function ``(data, logprobs_list) -> (loss, metrics)``.
            cotangents: in its place, dL/dlogprob of each datum's targets, float [T] or [T, K], of a loss that was evaluated
                elsewhere; fp64 is taken as it is. They are added as they are: nothing divides them later.

        Raises (by the future):
            BackendError: the weights have changed since.
            ConfigError: neither or both of ``loss_fn`` and ``cotangents``.
            InvalidDatumsError: cotangents of another shape than the targets, or not finite.
        """

        def work() -> Answer[ForwardBackwardOutput]:
            call = self._prepare(data, given_loss(loss_fn, cotangents, data), by_name=isinstance(loss_fn, (str, Loss)))
            return self._accumulate(
                call,
                lambda: self._everywhere.accumulate_retained(
                    call, retained, lambda rest: self._prepare([data[i] for i in rest], None)
                ),
            )

        named = "cotangents" if loss_fn is None else loss_name(loss_fn)
        return self._run(Call("backward", named, sized(data)), work, gradient=True)

    def gather_weights(self) -> Future[None]:
        """Hold the weights whole on every process until they change, so that each can read them without the others."""
        return self._run(Call("gather_weights"), self._everywhere.gather)

    def save_weights(
        self, name: str, *, overwrite: bool = False, folder: str | Path | None = None
    ) -> Future[SaveStateOutput]:
        """Write the weights alone, to sample from or to start from (default folder: ``checkpoint_dir``), atomically."""
        root = self._native.directory if folder is None else Path(folder)

        def work() -> Answer[SaveStateOutput]:
            ledger = self._accumulation.ledger
            return SaveStateOutput(self._everywhere.save_weights(root, name, overwrite, ledger))

        return self._run(Call("save_weights", name), work)

    def checkpoint_bytes(self, *, everything: bool = True) -> int:
        """Return how many bytes `save_state` would write now, or, if not everything, `save_weights`."""
        return checkpoint_bytes(self._native, self._accumulation.ledger, everything=everything)

    def export(
        self,
        path: str | Path,
        *,
        merged: bool = True,
        dtype: str | torch.dtype | None = None,
        overwrite: bool = False,
    ) -> Future[SaveStateOutput]:
        """Write the model as a folder that transformers loads: weights, config, and the tokenizer if there is one; atomically.

        On several processes the first one writes, in whose main memory there must be room for the whole model.

        An adapter is added to the weights below it in fp32, and each sum is rounded once to the dtype that is written. In
        bfloat16 that is an error of up to 2^-8 of each weight, which can be as large as what the adapter has learned; the log
        says how large it is, relative to the adapter's change.

        Args:
            path: of the folder.
            merged: add a LoRA adapter to the weights below it; False writes it alone, in PEFT's format, without any loss.
            dtype: of the weights that are written, e.g. ``float32``; None: that of the weights as they were loaded.
            overwrite: replace what is there.

        Raises (by the future):
            CheckpointError: the folder exists.
            ConfigError: no floating-point dtype, or one for an adapter alone.
            UnsupportedError: not a model of transformers, or one whose adapter cannot be written so.
        """
        from .models.load import torch_dtype

        def work() -> Answer[SaveStateOutput]:
            written = None if dtype is None else torch_dtype(dtype)
            export = Export(self._native.module, self.tokenizer, Path(path), merged, overwrite, written)
            return SaveStateOutput(self._everywhere.export(export))

        return self._run(Call("export", str(path)), work)

    @replaced("backends.TorchBackend.forward_retain")
    def hold(self, data: Sequence[Datum], *, budget: float | None = None) -> Future[RetainedForward]:
        """The old name of `forward_retain`."""
        return self.forward_retain(data, budget=budget)

    @replaced("backends.TorchBackend.backward")
    def pull(
        self, held: Mapping[RetainedForward, Sequence[int]], data: Sequence[Datum], loss_fn: str | Loss
    ) -> Future[ForwardBackwardOutput]:
        """The old name of `backward`."""
        return self.backward(held, data, loss_fn)
