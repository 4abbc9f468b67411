"""What training costs one process: bytes that it holds, and bytes that it receives. Arithmetic alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Final, final

from .....errors import ConfigError

__all__ = ["Placement", "RankMemory", "Step", "Traffic", "Weight", "rank_memory", "traffic"]

_FP32: Final = 4  # gradients, moments and masters are never smaller
_MOMENTS: Final = 2
_LAYERS_AT_ONCE: Final = 2  # one computes while the next one arrives


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
        return self.trained and self.bytes_each < _FP32

    @property
    def gradient_each(self) -> int:
        """Bytes of a number of its gradient: fp32 or better."""
        return max(_FP32, self.bytes_each)

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
    logprob_bytes: int = _FP32

    def __post_init__(self) -> None:
        wrong = {name: value for name, value in asdict(self).items() if not value >= 0}
        if wrong:
            raise ConfigError(f"what a step does must be counted in numbers of at least 0, got {wrong}")


@final
@dataclass(frozen=True)
class RankMemory:
    """Bytes that one process holds, by what they are for.

    Attributes:
        weights: shards, or on one process the whole; shards of trained half-precision weights are fp32.
        masters: fp32 copies of trained half-precision weights; 0 where shards serve as such.
        gradients: what has accumulated, between calls.
        moments: AdamW's two.
        gathered_weights: whole weights, as long as they are used.
        gathered_gradients: the gradients of the call that runs, before they are reduced or added to earlier ones.
        graphs: what autograd retains for the backward.
        head: hidden states at the head with their gradients, and one chunk of logits.
        stepping: a step's divided and clipped copy of the gradients.
    """

    weights: float
    masters: float
    gradients: float
    moments: float
    gathered_weights: float
    gathered_gradients: float
    graphs: float
    head: float
    stepping: float

    @property
    def resting(self) -> float:
        """Between two operations, gathered weights left out: weights, masters, gradients and moments."""
        return self.weights + self.masters + self.gradients + self.moments

    @property
    def total(self) -> float:
        """At most: in a backward, or in a step, in which there are no graphs and nothing is gathered."""
        backward = self.gathered_weights + self.gathered_gradients + self.graphs + self.head
        return self.resting + max(backward, self.stepping)

    def to_json(self) -> dict[str, float]:
        """Return the parts and their total by name."""
        return asdict(self) | {"total": self.total}


@final
@dataclass(frozen=True)
class Traffic:
    """Bytes that one process receives from others in a step; it sends as many.

    Attributes:
        gathers, reductions: of weights; of gradients, within a group of shards.
        replicas: of reduced gradients, between replicas.
        logprobs: of log-probs and cotangents.
        head: of a vocabulary-parallel head.
    """

    gathers: float
    reductions: float
    replicas: float
    logprobs: float
    head: float = 0.0

    @property
    def total(self) -> float:
        """Return the sum of all of them."""
        return self.gathers + self.reductions + self.replicas + self.logprobs + self.head

    def to_json(self) -> dict[str, float]:
        """Return the parts and their total by name."""
        return asdict(self) | {"total": self.total}


def rank_memory(model: Sequence[Weight], placement: Placement, step: Step) -> RankMemory:
    """Return what one process holds.

    With s shards, P weights and T trained ones of b bytes each, and g = max(4, b) bytes for what is fp32 (``gathered`` leaves a
    head in parts out, but for its rows in b bytes where shards are masters)::

        weights            P b / s      (P 4 / s where trained ones are in half precision and sharded)
        masters            T 4          (half precision, one process)
        gradients          T g / s
        moments            2 T g / s
        gathered weights   P b, or with resharding those outside of layers and two layers' (0 on one process)
        gathered gradients T g; with resharding T b outside of layers, and whatever is reduced at once, a layer or what is
                           outside of layers, as computed and as sent, T b + T g (0 on one process);
                           T g / s more from the second call of an accumulation
        stepping           T g / s

    Args:
        model: its parameters.
        placement: the processes.
        step: what they do.
    """
    shards, sharded = placement.shards, placement.sharded
    as_masters = sharded and any(w.half for w in model)
    trained = float(sum(w.shard(shards) * w.gradient_each for w in model if w.trained))
    again = trained if step.calls > 1 else 0.0  # the later calls' own, until they are added
    return RankMemory(
        weights=float(sum(w.shard(shards) * (_FP32 if as_masters else w.bytes_each) for w in model)),
        masters=0.0 if sharded else float(sum(w.shard(1) * _FP32 for w in model if w.half)),
        gradients=trained,
        moments=_MOMENTS * trained,
        gathered_weights=_whole(model, placement) if sharded else 0.0,
        gathered_gradients=(_waiting(model, placement) if sharded else 0.0) + again,
        graphs=step.graph_bytes,
        head=step.head_bytes,
        stepping=trained,
    )


def traffic(model: Sequence[Weight], placement: Placement, step: Step) -> Traffic:
    """Return what one process receives in a step.

    With s shards in each of r replicas, n = s r ranks, G bytes of whole weights as they are computed with, R bytes of whole
    gradients (fp32 or better), c calls, and m targets of a rank at most, of l bytes::

        without resharding   G (s - 1) / s gathered,  c R (s - 1) / s reduced
        with resharding      (G_root + (forwards + backwards) G_layers) (s - 1) / s,  backwards R (s - 1) / s
        between replicas     2 (R / s) (r - 1) / r with each reduction; a head in parts: once a call
        head in parts        see `exchange_bytes`; neither gathered nor reduced
        log-probs            2 m l (n - 1): they and their cotangents, filled up to those of the rank with most;
                             m l (n - 1) + N l for a function of all N, whose cotangents rank 0 sends

    With fp32 weights, all of them trained, in one call: 2 P (n - 1) / n and log-probs. What ranks agree on (which
    operation, which batch, whether all went well) is some ten kilobytes an operation and left out.
    """
    if not placement.sharded:
        return Traffic(0.0, 0.0, 0.0, 0.0)
    shards, replicas = placement.shards, placement.replicas
    others = (shards - 1) / shards
    sizes = _by_layer((w, w.gathered(shards)) for w in model)
    outside, layers = sizes.pop(None), sum(sizes.values())
    passes = step.forwards + step.backwards if placement.reshard else 1
    gradients = sum(w.gradient(shards) for w in model)
    rows = sum(w.shard(shards) * w.gradient_each for w in model if w.in_parts and w.trained)
    reductions = step.backwards if placement.reshard else step.calls
    entries = (1 if step.broadcast else 2) * step.targets * (placement.ranks - 1) + step.broadcast
    return Traffic(
        gathers=(outside + passes * layers) * others,
        reductions=reductions * gradients * others,
        replicas=2.0 * (reductions * gradients / shards + step.calls * rows) * (replicas - 1) / replicas,
        logprobs=float(entries * step.logprob_bytes),
        head=step.head_received,
    )


def _whole(model: Sequence[Weight], placement: Placement) -> float:
    """Return bytes of the weights that are whole on a rank at once."""
    sizes = _by_layer((w, w.gathered(placement.shards)) for w in model)
    outside, layers = sizes.pop(None), sorted(sizes.values(), reverse=True)
    outside += sum(w.shard(placement.shards) * w.bytes_each for w in model if w.in_parts and any(x.half for x in model))
    return float(outside + sum(layers[:_LAYERS_AT_ONCE] if placement.reshard else layers))


def _waiting(model: Sequence[Weight], placement: Placement) -> float:
    """Return bytes of the gradients that are whole on a rank at once."""
    sent = _by_layer((w, w.gradient(placement.shards)) for w in model)
    if not placement.reshard:
        return float(sum(sent.values()))
    computed = _by_layer((w, w.gathered(placement.shards)) for w in model if w.trained)
    layers = [sent[layer] + computed[layer] for layer in computed if layer is not None]
    return float(computed[None] + max([sent[None], *layers]))


def _by_layer(sizes: Iterable[tuple[Weight, int]]) -> dict[int | None, int]:
    """Return sums of bytes by layer; None: outside of them."""
    found: dict[int | None, int] = {None: 0}
    for weight, size in sizes:
        found[weight.layer] = found.get(weight.layer, 0) + size
    return found
