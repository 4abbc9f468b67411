"""Models of a service: any number of LoRA adapters on one base, isolated from each other, and their checkpoints."""

from __future__ import annotations

import copy
import functools
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from ...backends import TorchBackend
from ...backends.native.checkpoints.checkpoint import fingerprint, load_weights
from ...backends.native.checkpoints.files import MANIFEST
from ...backends.native.models.facts.model_facts import read_facts
from ...backends.native.models.hf import HFModel
from ...backends.native.models.layers import LLAMA, LayerNames, layer_names
from ...backends.native.models.lora import ATTENTION, MLP, UNEMBED, LoraChoice, add_lora, saved_config
from ...backends.native.optimizer import forget_casts
from ...backends.preserve import restored_after_failure
from ...errors import CheckpointError, ConfigError, ServiceError, require_extra
from ..durability.checkpoints import Checkpoints
from .batches import Batches
from .encryption import encrypt_files
from .naming import naming
from .sampler import Sampler

__all__ = ["Base", "ServedModels"]


@final
@dataclass(frozen=True, eq=False)
class Base:
    """The frozen model that all adapters share.

    Args:
        name: what clients call it.
        model: a transformers causal language model.
        tokenizer_id: what clients load its tokenizer by, on whichever machine they are, such as the id of a public repository;
            None: they are told nothing, and the SDK tries the model's name.
        options: of every `TorchBackend`.
        attention, mlp, unembed: names of the layers that ``train_attn``, ``train_mlp`` and ``train_unembed`` mean; where
            none are given, those of the model, whatever their names.
        tokenizer_folder: where this server loads the tokenizer from; None: by ``tokenizer_id``.
    """

    name: str
    model: nn.Module
    tokenizer_id: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    attention: Sequence[str] = ATTENTION
    mlp: Sequence[str] = MLP
    unembed: Sequence[str] = UNEMBED
    tokenizer_folder: str | None = None

    def adapted(self, lora: LoraChoice | Path) -> HFModel:
        """Return a model with an adapter of its own; its frozen weights are the base's, not copies.

        Args:
            lora: what gets an adapter, or the checkpoint whose adapter's settings are used.

        Raises:
            ConfigError: nothing would be trained.
        """
        layers = lora.layers(self.names) if isinstance(lora, LoraChoice) else None
        with torch.random.fork_rng():
            torch.manual_seed(lora.seed if isinstance(lora, LoraChoice) else 0)
            return HFModel(add_lora(self.copy(), lora, layers))

    @functools.cached_property
    def names(self) -> LayerNames:
        """The names of the layers that a choice can be made of."""
        given = LayerNames(tuple(self.attention), tuple(self.mlp), tuple(self.unembed))
        return layer_names(self.model) if given == LLAMA else given

    def saved_choice(self, lora: LoraChoice, folder: Path) -> LoraChoice:
        """Return a choice, changed to what a checkpoint's adapter says.

        Raises:
            CheckpointError: it has no adapter.
        """
        with naming(f"checkpoint {folder.parent.name}/{folder.name}", folder):
            return lora.as_saved(saved_config(folder), self.names)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A digest that another model of the same shapes does not have."""
        return fingerprint(self.model.named_parameters())

    @functools.cached_property
    def context(self) -> int | None:
        """Longest text, tokens; None = not known."""
        return read_facts(getattr(self.model, "config", None)).max_length

    def tokenizer(self) -> Any:
        """Return its tokenizer, from this machine's disk: the names of a hub are not looked up.

        Raises:
            ConfigError: this server has none.
        """
        place, lacks = self.tokenizer_folder or self.tokenizer_id, ""
        if place is not None:
            try:
                return _tokenizer(place)
            except (OSError, ValueError):  # of a folder of its own, clients are told nothing
                lacks = f" ({self.tokenizer_id} is not on its disk)" if self.tokenizer_id == place else ""
        raise ConfigError(
            f"strings to stop at need a tokenizer, and this server has none for its model{lacks}: give stop as token ids"
        )

    def copy(self) -> nn.Module:
        """Return the modules anew around the same tensors."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        copied: nn.Module = copy.deepcopy(self.model, {id(t): t for t in tensors})
        return copied


@final
class ServedModels:
    """Models by id.

    Args:
        base: shared by all.
        root: folder of all checkpoints.

    Attributes:
        failure: why no operation can run until the server is started again; None: all is well.
    """

    failure: str | None = None

    def __init__(self, base: Base, root: Path) -> None:
        self.base, self.checkpoints = base, Checkpoints(root)
        self.backends: dict[str, TorchBackend] = {}
        self.choices: dict[str, LoraChoice] = {}
        self._explicit: dict[str, frozenset[str]] = {}
        self._batches = Batches(lambda: HFModel(base.copy()))

    def create(self, model_id: str, lora: LoraChoice, explicit: Iterable[str] = ()) -> None:
        """Make a model with a fresh adapter.

        Args:
            model_id: its id.
            lora: what gets an adapter.
            explicit: names of what a client chose in it; a checkpoint that says otherwise is refused.
        """
        self.backends[model_id] = self._backend(model_id, lora)
        self.choices[model_id], self._explicit[model_id] = lora, frozenset(explicit)

    def release(self, model_id: str) -> None:
        """Let go of a model; its checkpoints stay."""
        self.backends.pop(model_id, None)
        self.choices.pop(model_id, None)
        self._explicit.pop(model_id, None)

    def backend(self, model_id: str, *, scores_only: bool = False) -> TorchBackend:
        """Return a model.

        Args:
            model_id: its id.
            scores_only: nothing about it will change.

        Raises:
            ServiceError: it could not be created, or is a frozen base and would change.
        """
        if model_id not in self.backends:
            raise ServiceError(f"model {model_id!r} could not be created; read the error of its creation")
        if self.choices[model_id].base_only and not scores_only:
            raise ServiceError(f"{model_id!r} was created with base_only: it is the frozen base, and only scores")
        return self.backends[model_id]

    def save(self, model_id: str, kind: str, name: str, overwrite: bool, readers: Sequence[Any] = ()) -> str:
        """Write a checkpoint: everything, or (for a sampler, or for download) the weights; return the URI.

        Args:
            model_id: of the model.
            kind: of the checkpoint.
            name: of the checkpoint.
            overwrite: replace one of this name.
            readers: the only ones that can read it, where there are any.

        Raises:
            CheckpointError: the name leaves the folder, is too long, or is taken.
        """
        backend, uri = self.backend(model_id), self.checkpoints.uri(model_id, kind, name)
        folder = self.checkpoints.folder(model_id, kind)
        with naming(uri, folder / name):
            if kind == "weights":
                backend.save_state(name, overwrite=overwrite).result()
            elif readers:
                self._save_encrypted(backend, folder, name, readers)
            else:
                backend.save_weights(name, overwrite=overwrite, folder=folder).result()
        return uri

    @staticmethod
    def _save_encrypted(backend: TorchBackend, root: Path, name: str, readers: Sequence[Any]) -> None:
        if (root / name).exists():
            raise CheckpointError(f"an export named {name!r} exists; choose another name")
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=root) as scratch:
            saved = Path(backend.save_weights(name, folder=scratch).result().path)
            encrypt_files([file for file in saved.iterdir() if file.name != MANIFEST], readers)
            os.rename(saved, root / name)

    def load(
        self, model_id: str, uri: str, optimizer: bool, record: Callable[[LoraChoice], None] = lambda choice: None
    ) -> None:
        """Load a checkpoint into a model: weights, or everything.

        The adapter becomes what the checkpoint's own configuration says, and gradients that have accumulated are forgotten. If
        the checkpoint cannot be loaded, or what it is cannot be recorded, weights, optimizer and gradients are as they were.

        Args:
            model_id: the model.
            uri: of the checkpoint.
            optimizer: load everything.
            record: is told the choice of the adapter that was loaded.

        Raises:
            CheckpointError: there is none, or the client chose another adapter than it has.
        """
        path = self.checkpoints.loadable(uri)
        with naming(uri, path):
            self._load(model_id, uri, path, optimizer, record)

    def _load(self, model_id: str, uri: str, path: Path, optimizer: bool, record: Callable[[LoraChoice], None]) -> None:
        backend, choice = self.backend(model_id), self.choices[model_id]
        saved = self.base.saved_choice(choice, path)
        theirs, ours = saved.to_json(), choice.to_json()
        differing = sorted(name for name in self._explicit[model_id] & theirs.keys() if theirs[name] != ours[name])
        if differing:
            differences = ", ".join(f"{name} {theirs[name]} (here {ours[name]})" for name in differing)
            raise CheckpointError(
                f"the adapter of {uri} has {differences}, unlike what this model was asked for: create one from the checkpoint"
            )
        if saved != choice:
            backend = self._backend(model_id, path)
        with restored_after_failure(backend):
            (backend.load_state_with_optimizer(path) if optimizer else backend.load_state(path)).result()
            record(saved)
        self.backends[model_id], self.choices[model_id] = backend, saved

    def sampler(self, model_id: str) -> Sampler:
        """Return what samples from a model's present weights, of which it has a copy."""
        backend = self.backend(model_id)
        frozen = self.base.adapted(self.choices[model_id])
        _copy_adapter(backend.model, frozen)
        return self._sampler(frozen, backend.weights_version)

    def saved_sampler(self, uri: str) -> Sampler:
        """Return what samples from a checkpoint.

        Raises:
            CheckpointError: there is none, it is damaged, or it was trained on another base.
        """
        folder = self.checkpoints.loadable(uri)
        with naming(uri, folder):
            model = self.base.adapted(folder)
            load_weights(model, folder)
        return self._sampler(model, 0)

    def base_sampler(self) -> Sampler:
        """Return what samples from the base."""
        return self._sampler(self._batches.base, 0)

    def _sampler(self, model: HFModel, version: int) -> Sampler:
        return Sampler(model, version, self._batches.of(model))

    def _backend(self, model_id: str, lora: LoraChoice | Path) -> TorchBackend:
        folder = self.checkpoints.folder(model_id, "weights")
        return TorchBackend(self.base.adapted(lora), checkpoint_dir=folder, **self.base.options)


@functools.cache
def _tokenizer(place: str) -> Any:
    """Load a tokenizer of a folder, or of a hub's name if that is on this disk: for the network everybody would wait."""
    loader = require_extra("transformers", "hf", "strings in stop").AutoTokenizer
    hub = require_extra("huggingface_hub", "hf", "strings in stop")
    return loader.from_pretrained(
        place if Path(place).is_dir() else hub.snapshot_download(place, local_files_only=True)
    )


@torch.no_grad()
def _copy_adapter(source: nn.Module, target: nn.Module) -> None:
    parameters = dict(source.named_parameters())
    for name, p in target.named_parameters():
        if p.requires_grad:
            p.copy_(parameters[name])
    forget_casts()
