"""What a budget is made for: the weights of a model, the processes that they are spread over, and what a step does."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Final, final

from .....errors import ConfigError

__all__ = ["FP32", "Placement", "Step", "Weight", "bytes_by_layer"]

FP32: Final = 4  # bytes; gradients, moments and masters are never smaller


@final
@dataclass(frozen=True)
class Weight:
    """One parameter of a model.

    Attributes:
        rows: its first dimension, which is what is shared out among ranks.
        row: numbers of one row.
        bytes_each: of a number, as the model computes with it.
        trained: it gets a gradient.
        layer: which layer it is in; None: in none (embeddings, last norm, head).
        in_parts: each rank computes with its own rows, which are never gathered: a vocabulary-parallel head.
    """

    rows: int
    row: int
    bytes_each: int
    trained: bool
    layer: int | None = None
    in_parts: bool = False

    @property
    def half(self) -> bool:
        """It is trained in half precision, which needs an fp32 master."""
        return self.trained and self.bytes_each < FP32

    @property
    def gradient_each(self) -> int:
        """Bytes of a number of its gradient: fp32 or better."""
        return max(FP32, self.bytes_each)

    def shard(self, shards: int) -> int:
        """``ceil(rows / shards) * row``: numbers on a rank, those that fill up the last one's included."""
        return -(-self.rows // shards) * self.row

    def gathered(self, shards: int) -> int:
        """Bytes of the whole, put together of shards; 0 where it never is."""
        return 0 if self.in_parts else self.shard(shards) * shards * self.bytes_each

    def gradient(self, shards: int) -> int:
        """Bytes of the whole gradient; 0 where it is frozen, or there never is a whole one."""
        return self.shard(shards) * shards * self.gradient_each if self.trained and not self.in_parts else 0


@final
@dataclass(frozen=True)
class Placement:
    """Over which processes a model is spread.

    Args:
        ranks: all processes.
        replicas: groups of them that hold the whole model each (HSDP).
        reshard: a layer's weights are freed after use; otherwise they are gathered once a step and stay.

    Raises:
        ConfigError: the ranks cannot be dealt out so.
    """

    ranks: int = 1
    replicas: int = 1
    reshard: bool = False

    def __post_init__(self) -> None:
        if self.ranks < 1 or self.replicas < 1 or self.ranks % self.replicas:
            raise ConfigError(
                f"replicas must divide ranks, and both be at least 1, got {self.ranks} ranks and {self.replicas} replicas"
            )

    @property
    def shards(self) -> int:
        """Ranks that a model is cut over."""
        return self.ranks // self.replicas

    @property
    def sharded(self) -> bool:
        """The model is wrapped for several processes."""
        return self.ranks > 1


@final
@dataclass(frozen=True)
class Step:
    """What a rank does between two optimizer steps.

    Args:
        graph_bytes: of the graphs that it retains at once.
        head_bytes: that the head needs beside them.
        head_received: bytes that a vocabulary-parallel head receives: hidden states, sums, and their gradients.
        forwards, backwards: passes through the model; a forward that runs twice counts twice.
        calls: gradient operations, each of which reduces once where weights stay gathered.
        targets: target tokens of the rank that has most of them, over all calls.
        broadcast: targets of a function of all log-probs, whose cotangents rank 0 sends; 0: those of each rank are gathered.
        logprob_bytes: of one log-prob.

    Raises:
        ConfigError: a number is negative.
    """

    graph_bytes: float = 0.0
    head_bytes: float = 0.0
    head_received: float = 0.0
    forwards: int = 1
    backwards: int = 1
    calls: int = 1
    targets: int = 0
    broadcast: int = 0
    logprob_bytes: int = FP32

    def __post_init__(self) -> None:
        wrong = {name: value for name, value in asdict(self).items() if not value >= 0}
        if wrong:
            raise ConfigError(f"what a step does must be counted in numbers of at least 0, got {wrong}")


def bytes_by_layer(sizes: Iterable[tuple[Weight, int]]) -> dict[int | None, int]:
    """Return sums of bytes by layer; None: outside of them."""
    found: dict[int | None, int] = {None: 0}
    for weight, size in sizes:
        found[weight.layer] = found.get(weight.layer, 0) + size
    return found
