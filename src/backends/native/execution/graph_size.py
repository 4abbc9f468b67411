"""What autograd retains of a token in a Llama-shaped model, by arithmetic: for a model that is not there to be measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, final

from ....ops.logprobs import chunk_bytes

__all__ = ["GraphShape", "head_bytes"]

_FP32: Final = 4  # norms compute in it
_INDEX: Final = 8  # int64
_SHARED_INPUTS: Final = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


@final
@dataclass(frozen=True)
class GraphShape:
    """A decoder layer of norm, attention, norm and gated MLP, and how it is trained.

    Attributes:
        layers: how many.
        hidden, intermediate: widths, H and I.
        heads: of the queries.
        queries, keys: width of all heads of the queries, and of the keys, Q and K.
        head_width: of one.
        bytes_each: of an activation.
        adapters: rank of the adapter on each matrix, by its name (``q_proj``, ...); empty: every weight is trained.
        checkpointed: layers run again in the backward.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    queries: int
    keys: int
    head_width: int
    bytes_each: int
    adapters: Mapping[str, int]
    checkpointed: bool = False

    @property
    def full(self) -> bool:
        """Every weight is trained."""
        return not self.adapters

    @property
    def per_token(self) -> float:
        """Bytes of a graph per token, those of all layers and of what is around them.

        A checkpointed layer keeps its input, ``e H``, for e bytes an activation. Around the layers: the last norm's input,
        the angles of RoPE (``2 e D``, which a checkpointed layer computes from again), and three indices: the token, and where
        its hidden state lies before and after the untrained ones are left out.
        """
        indices = (3 if self.full else 2) * _INDEX
        around = indices + self._norm + (0 if self.checkpointed else 2 * self.bytes_each * self.head_width)
        if self.checkpointed:
            return around + self.layers * self.bytes_each * self.hidden
        # A frozen embedding has no gradient, so that of the first norm nothing is kept.
        return around + self.layers * self.per_layer - (0 if self.full else self._norm)

    @property
    def again(self) -> float:
        """Bytes per token of the one layer that has just run again in the backward; 0 without checkpointing."""
        return float(self.per_layer) if self.checkpointed else 0.0

    @property
    def per_layer(self) -> int:
        """Bytes of one layer's graph per token, uncheckpointed.

        With e bytes an activation: two norms, ``4 H + 4`` each (and ``e H`` where their weights are trained); queries, keys
        and values, ``e (Q + 2 K)``; attention's result and its log-sum-exp, ``e Q + 4`` a head; the gate before and after
        its activation, and what it multiplies, ``3 e I``; and the inputs of the matrices.
        """
        attention = self.bytes_each * (2 * self.queries + 2 * self.keys) + self._wide * self.heads
        return 2 * self._norm + attention + 3 * self.bytes_each * self.intermediate + self._inputs

    @property
    def _wide(self) -> int:
        """Bytes of a number of an adapter, or of a log-sum-exp: fp32 or better."""
        return max(_FP32, self.bytes_each)

    @property
    def _norm(self) -> int:
        scaled = self.bytes_each * self.hidden if self.full else 0
        return _FP32 * (self.hidden + 1) + scaled

    @property
    def _inputs(self) -> int:
        """Bytes of the matrices' inputs.

        All trained: one for the three of queries, keys and values, ``e H``; attention's, as one row of all sequences, ``e Q``;
        one for gate and up, ``e H``; and the product of the two, ``e I``. With adapters of rank r: ``4 r`` each and its input,
        which adapters in fp32 share where the model is so too, and cast each for itself, to 4 bytes, where it is not.
        """
        widths = (self.hidden, self.queries, self.hidden, self.intermediate)
        if self.full:
            return self.bytes_each * sum(widths)
        found = self._wide * sum(self.adapters.values())
        for names, width in zip(_SHARED_INPUTS, widths, strict=True):
            users = sum(name in self.adapters for name in names)
            found += self._wide * width * (min(users, 1) if self.bytes_each == self._wide else users)
        return found


def head_bytes(tokens: int, hidden: int, vocab: int, bytes_each: int, *, trained: bool, gpu: bool) -> float:
    """Return what the head holds for N scored tokens, beside weights and their gradients.

    Hidden states and their gradient, ``2 e N H``; one chunk of logits, at most ``4 N V`` and 12 MiB (on a GPU 512 MiB).
    Frozen: ``e N H`` for the derivative of each log-prob. Trained: a chunk of up to ``4 V H``, and as much for the weight's
    gradient in fp32.

    Args:
        tokens: N.
        hidden, vocab: H and V.
        bytes_each: of an activation.
        trained: the head has a gradient.
        gpu: it lies on one.
    """
    states = bytes_each * tokens * hidden
    chunk = min(chunk_bytes(vocab * hidden, trained=trained, gpu=gpu), _FP32 * tokens * vocab)
    return float(2 * states + chunk + (_FP32 * vocab * hidden if trained else states))
