"""A loss function of another project, and which project that is."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor

from pullback.losses.functional import log1mexp

__all__ = ["PADDED", "PEERS", "Peer", "Setting", "Wrapped", "interleaved", "selected", "two_token_logits"]

_RECORDING: Final = Path(__file__).parents[2] / "tests" / "golden" / "recording.py"
PADDED: Final = {"form": "padded"}
Function = Callable[..., Any]
_AREAL_SERVICES: Final = (
    *("aiofiles", "aiohttp", "einops", "flask", "httpx", "hydra", "lark", "numba", "openai", "PIL", "pybase64"),
    *("swanlab", "tabulate", "tenacity", "tensorboardX", "torchdata", "trackio", "uvloop", "wandb", "werkzeug"),
)


@final
@dataclass(frozen=True)
class Peer:
    """A project.

    Attributes:
        distribution: its name on the package index.
        module: what is imported of it.
        beside: packages that it imports beside its losses, and that its losses do not call; stood in for where absent.
    """

    distribution: str
    module: str
    beside: tuple[str, ...] = ()

    @property
    def version(self) -> str | None:
        """What is installed, if anything is."""
        try:
            return version(self.distribution) if find_spec(self.module) else None
        except PackageNotFoundError:
            return None

    def prepare(self) -> None:
        """Stand in for what it imports and does not need here."""
        missing = [name for name in self.beside if find_spec(name) is None]
        if missing:
            runpy.run_path(str(_RECORDING))["stand_in_for"](*missing)


PEERS: Final[Mapping[str, Peer]] = {
    "TRL": Peer("trl", "trl"),
    "Liger": Peer("liger-kernel", "liger_kernel"),
    "verl": Peer("verl", "verl", ("ray", "codetiming", "orjson")),
    "SkyRL": Peer("skyrl", "skyrl", ("ray", "cloudpathlib", "skyrl_gym")),
    "torchrl": Peer("torchrl", "torchrl"),
    "Hatchery": Peer("hatchery-core", "hatchery"),
    "torchtune": Peer("torchtune", "torchtune", ("torchao", "sentencepiece", "tiktoken", "blobfile", "kagglehub")),
    "tinker-cookbook": Peer(
        "tinker-cookbook", "tinker_cookbook", ("chz", "tinker", "PIL", "blobfile", "termcolor", "tiktoken")
    ),
    "AReaL": Peer("areal", "areal", _AREAL_SERVICES),  # the last one: it has much stood in for
}


@final
@dataclass(frozen=True)
class Wrapped:
    """A loss of a peer's.

    Attributes:
        peer: whose it is, a key of `PEERS`.
        name: what it is called here: its function and the settings that matter.
        place: where it stands, dotted.
        build: imports it and returns it as a function that `check_loss` can call. The wrapper gives it its inputs in the
            form that it is called with there, and computes nothing of its own.
        options: of `check_loss`.
        estimates: whether it is a KL to the reference and nothing else, whose expected gradient can be compared.
    """

    peer: str
    name: str
    place: str
    build: Callable[[], Function]
    options: Mapping[str, Any] = field(default_factory=lambda: PADDED)
    estimates: bool = False

    @property
    def missing(self) -> str | None:
        """Why it cannot be run here."""
        peer = PEERS[self.peer]
        return None if peer.version else f"needs {peer.distribution}, which is not installed"

    def load(self) -> Function:
        """Return the function."""
        PEERS[self.peer].prepare()
        return self.build()


@final
@dataclass(frozen=True)
class Setting:
    """A setting that should matter: the same function without and with it.

    Attributes:
        peer, name, place: as of `Wrapped`.
        words: the setting.
        without, given: build the function.
        options: of `check_loss`.
    """

    peer: str
    name: str
    place: str
    words: str
    without: Callable[[], Function]
    given: Callable[[], Function]
    options: Mapping[str, Any] = field(default_factory=lambda: PADDED)


def selected(x: Tensor, mask: Tensor) -> Tensor:
    """Return log-probs as a head gives them that computes none where the label is ignored: 0 there."""
    return torch.where(mask != 0, x, torch.zeros_like(x))


def interleaved(x: Tensor) -> Tensor:
    """Return rows that are chosen and rejected by turns as chosen ones, then rejected ones."""
    return torch.cat([x[0::2], x[1::2]])


def two_token_logits(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Return logits over two tokens, the first of which has these log-probs; [B, T, 2]."""
    first = torch.where(mask != 0, logprobs, torch.full_like(logprobs, -1.0))
    return torch.stack([first, log1mexp(first.clamp(max=-1e-12))], -1)
