"""Models of a service: any number of LoRA adapters on one base, isolated from each other, and their checkpoints."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from ..backends import SamplingParams, TorchBackend
from ..backends.native.batching import ScoreRequest
from ..backends.native.hf import HFModel
from ..backends.native.sampling import draw
from ..backends.native.scoring import score
from ..backends.types import Rollout
from ..datums.types import ModelInput
from ..errors import CheckpointError, ConfigError, require_extra

__all__ = ["Base", "LoraChoice", "Sampler", "Tenants"]

_ATTENTION: Final = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP: Final = ("gate_proj", "up_proj", "down_proj")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@final
@dataclass(frozen=True)
class LoraChoice:
    """What of the base gets an adapter.

    Args:
        rank: of the adapters.
        seed: of their start.
        train_attn, train_mlp, train_unembed: attention, feed-forward, output projection.
    """

    rank: int
    seed: int = 0
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True

    @property
    def targets(self) -> list[str]:
        """Names of the adapted layers.

        Raises:
            ConfigError: there are none.
        """
        found = [
            *(_ATTENTION if self.train_attn else ()),
            *(_MLP if self.train_mlp else ()),
            *(("lm_head",) if self.train_unembed else ()),
        ]
        if not found:
            raise ConfigError("lora_config trains nothing: set train_attn, train_mlp or train_unembed")
        return found


@final
@dataclass(frozen=True, eq=False)
class Base:
    """The frozen model that all adapters share.

    Args:
        name: what clients call it.
        model: a transformers causal language model.
        tokenizer_id: a folder that its tokenizer can be loaded from, for clients; None if there is none.
        options: of every `TorchBackend`.
    """

    name: str
    model: nn.Module
    tokenizer_id: str | None
    options: dict[str, Any]

    def adapted(self, lora: LoraChoice) -> HFModel:
        """Return a model with an adapter of its own; its frozen weights are the base's, not copies."""
        peft = require_extra("peft", "hf", "the service")
        config = peft.LoraConfig(
            r=lora.rank,
            lora_alpha=lora.rank,
            target_modules=lora.targets,
            task_type="CAUSAL_LM",
            ensure_weight_tying=False,
        )
        with torch.random.fork_rng(), warnings.catch_warnings():
            # The adapter is on the output projection alone, as the protocol has it; the embedding stays the base's.
            warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`", UserWarning)
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            torch.manual_seed(lora.seed)
            return HFModel(peft.get_peft_model(self.copy(), config))

    def copy(self) -> nn.Module:
        """Return the modules anew around the same tensors."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        copied: nn.Module = copy.deepcopy(self.model, {id(t): t for t in tensors})
        return copied


@final
@dataclass(frozen=True, eq=False)
class Sampler:
    """Weights to sample from, frozen at the moment they were saved."""

    model: HFModel
    version: int

    def sample(self, prompt: ModelInput, n: int, params: SamplingParams) -> list[Rollout]:
        """Draw n completions."""
        device = next(self.model.parameters()).device
        generator = torch.Generator(device)
        generator.seed()
        return draw(self.model, [prompt], n, params, generator, self.version)

    @torch.no_grad()
    def prompt_logprobs(self, prompt: ModelInput) -> list[float]:
        """Return the log-prob of each prompt token given those before it; NaN for the first."""
        tokens = prompt.tokens
        if len(tokens) < 2:
            return [float("nan")] * len(tokens)
        needed = torch.ones(len(tokens) - 1, dtype=torch.bool)
        found: Tensor = score(self.model, [ScoreRequest(tokens[:-1], tokens[1:], needed)], "single")
        return [float("nan"), *found.tolist()]


@final
class Tenants:
    """Models by id, and where their checkpoints lie.

    Args:
        base: shared by all.
        root: folder of all checkpoints: ``root / model id / kind / name``.
    """

    def __init__(self, base: Base, root: Path) -> None:
        self.base, self.root = base, root
        self.backends: dict[str, TorchBackend] = {}
        self.choices: dict[str, LoraChoice] = {}

    def create(self, model_id: str, lora: LoraChoice) -> None:
        """Make a model with a fresh adapter."""
        folder = self.folder(model_id) / "weights"
        backend = TorchBackend(self.base.adapted(lora), checkpoint_dir=folder, **self.base.options)
        self.backends[model_id], self.choices[model_id] = backend, lora

    def folder(self, model_id: str) -> Path:
        """Where a model's checkpoints lie."""
        return self.root / model_id.replace(":", "_")

    def save(self, model_id: str, name: str, overwrite: bool) -> str:
        """Write everything that the next step depends on; return the URI.

        Raises:
            CheckpointError: the name leaves the folder, or is taken.
        """
        self.backends[model_id].save_state(name, overwrite=overwrite).result()
        return f"tinker://{model_id}/weights/{name}"

    def load(self, model_id: str, uri: str, optimizer: bool) -> None:
        """Load a checkpoint into a model: weights, or everything."""
        backend = self.backends[model_id]
        path = self.locate(uri)
        backend.discard_gradients()
        (backend.load_state_with_optimizer(path) if optimizer else backend.load_state(path)).result()

    def locate(self, uri: str) -> Path:
        """Return the folder of a checkpoint URI.

        Raises:
            CheckpointError: it is none, or there is nothing.
        """
        parts = uri.removeprefix("tinker://").split("/")
        known = (
            uri.startswith("tinker://") and len(parts) == 3 and all(_NAME.fullmatch(p.replace(":", "_")) for p in parts)
        )
        if not known:
            raise CheckpointError(
                f"{uri!r} is no checkpoint of this server: tinker://<model id>/weights/<name> was expected"
            )
        path = self.folder(parts[0]) / parts[1] / parts[2]
        if not path.is_dir():
            raise CheckpointError(f"there is no checkpoint {uri}")
        return path

    def sampler(self, model_id: str) -> Sampler:
        """Freeze a model's present weights for sampling."""
        backend = self.backends[model_id]
        frozen = self.base.adapted(self.choices[model_id])
        _copy_adapter(backend.model, frozen)
        return Sampler(frozen, backend.weights_version)

    def base_sampler(self) -> Sampler:
        """Sample from the base."""
        return Sampler(HFModel(self.base.copy()), 0)


@torch.no_grad()
def _copy_adapter(source: nn.Module, target: nn.Module) -> None:
    found = dict(source.named_parameters())
    for name, p in target.named_parameters():
        if p.requires_grad:
            p.copy_(found[name])


def tokens_of(chunks: Sequence[Any]) -> list[int]:
    """Return the tokens of a JSON model input.

    Raises:
        ConfigError: it holds what is no text.
    """
    found: list[int] = []
    for chunk in chunks:
        if chunk.get("type", "encoded_text") != "encoded_text":
            raise ConfigError(f"the prompt has a chunk of type {chunk.get('type')!r}; only text can be read here")
        found += chunk["tokens"]
    return found
