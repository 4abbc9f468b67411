"""TokenBatch: what a loss sees. Tensors only, packed, aligned to the target tokens."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Final, NamedTuple, final

import torch
from torch import Tensor

from ..deprecation import renamed_keyword
from ..errors import ConfigError, DatumError, IncompleteUnitError, LengthError, MissingFieldError
from .keys import ROLE_CHOSEN, ROLE_REJECTED

__all__ = ["Groups", "Pairs", "TokenBatch"]

_TOKEN_FIELDS: Final = ("weights", "advantages", "rollout_logprobs", "old_logprobs", "ref_logprobs")
_SEQUENCE_FIELDS: Final = ("pair_id", "role", "group_id", "label")
_DATUM_KEYS: Final = {"rollout_logprobs": "logprobs"}  # the batch's own `logprobs` are the current policy's


class Pairs(NamedTuple):
    """Sequence indices of the preference pairs: ``chosen[p]`` is preferred to ``rejected[p]``. Both int64 [P]."""

    chosen: Tensor
    rejected: Tensor


@final
@dataclass(frozen=True, eq=False)
class Groups:
    """``index[b]`` is the group of sequence b, numbered 0 .. count-1. int64 [B]."""

    index: Tensor
    count: int


@final
@dataclass(frozen=True, eq=False)
class TokenBatch:
    """B sequences of N tokens in all, packed end to end.

    Args:
        logprobs: current policy's log-prob of each target token, nats; [N], or [N, K] for soft targets.
        offsets: int64 [B + 1]; sequence b is ``logprobs[offsets[b]:offsets[b + 1]]``.
        weights: shape of ``logprobs``; 0 = not trained. Absent: every token has weight 1.
        advantages: [N]; positive = more of this token.
        rollout_logprobs: [N]; the rollout policy's (the sampler's) log-probs, in datums the key ``logprobs``.
        old_logprobs: [N]; the proximal anchor, where it differs from the sampler.
        ref_logprobs: [N]; the frozen reference's log-probs.
        pair_id, role, group_id, label: int64 [B]; see `pullback.losses.keys`.

    Raises:
        LengthError: a tensor has another shape than its place demands.
    """

    logprobs: Tensor
    offsets: Tensor
    weights: Tensor | None = None
    advantages: Tensor | None = None
    rollout_logprobs: Tensor | None = None
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    pair_id: Tensor | None = None
    role: Tensor | None = None
    group_id: Tensor | None = None
    label: Tensor | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.logprobs.shape)
        if len(shape) not in (1, 2):
            raise LengthError(f"logprobs must be [N] or [N, K], got shape {shape}")
        if int(self.offsets[0]) != 0 or int(self.offsets[-1]) != shape[0] or bool((self.offsets.diff() < 0).any()):
            raise LengthError(f"offsets must rise from 0 to {shape[0]}, got {self.offsets.tolist()}")
        if self.weights is not None and not self.weights.is_floating_point() and bool((self.weights == -100).any()):
            raise ConfigError("weights contain -100: these are transformers' labels; give weights = labels != -100")
        for name in _TOKEN_FIELDS:
            _check_shape(name, getattr(self, name), shape, "the shape of logprobs")
        for name in _SEQUENCE_FIELDS:
            _check_shape(name, getattr(self, name), (self.num_sequences,), "one number per sequence")

    @classmethod
    @renamed_keyword("behaviour_logprobs", "rollout_logprobs")
    def from_packed(cls, logprobs: Tensor, lengths: Tensor | list[int], **inputs: Tensor | None) -> TokenBatch:
        """Build from packed tensors and the length of each sequence (int64 [B])."""
        _tensor("logprobs", logprobs)
        lengths = torch.as_tensor(lengths, dtype=torch.int64, device=logprobs.device)
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        return cls(logprobs, offsets, **_to_device(logprobs, inputs))

    @classmethod
    @renamed_keyword("behaviour_logprobs", "rollout_logprobs")
    def from_padded(cls, logprobs: Tensor, weights: Tensor, **inputs: Tensor | None) -> TokenBatch:
        """Build from right- or left-padded [B, T] tensors; padding is a position of weight 0.

        Args:
            logprobs: [B, T], target-aligned: ``logprobs[b, j]`` scores the token that ``weights[b, j]`` weighs.
            weights: [B, T], float or bool; 0 on padding and on prompts.
            inputs: the other fields of `TokenBatch`, [B, T]; ``advantages`` may be [B] (one per sequence);
                ``pair_id``, ``role``, ``group_id`` and ``label`` are [B].
        """
        if _tensor("logprobs", logprobs).dim() != 2:
            raise LengthError(f"logprobs must be [B, T], got shape {tuple(logprobs.shape)}")
        rows, width = logprobs.shape
        flat: dict[str, Tensor | None] = {}
        for name, value in {"weights": weights, **inputs}.items():
            if value is not None and name in _TOKEN_FIELDS:
                value = _tensor(name, value)
                if name == "advantages" and value.dim() == 1:
                    value = value[:, None].expand(-1, width)
                _check_shape(name, value, (rows, width), "the shape of logprobs")
                value = value.reshape(-1)
            flat[name] = value
        offsets = torch.arange(rows + 1, device=logprobs.device) * width
        return cls(logprobs.reshape(-1), offsets, **_to_device(logprobs, flat))

    @property
    def behaviour_logprobs(self) -> Tensor | None:
        """Deprecated spelling of ``rollout_logprobs``."""
        warnings.warn("TokenBatch.behaviour_logprobs is now rollout_logprobs", DeprecationWarning, stacklevel=2)
        return self.rollout_logprobs

    @property
    def num_sequences(self) -> int:
        """B."""
        return self.offsets.numel() - 1

    @cached_property
    def sequence_index(self) -> Tensor:
        """Which sequence each token belongs to; int64 [N]."""
        order = torch.arange(self.num_sequences, device=self.offsets.device)
        return order.repeat_interleave(self.offsets.diff())

    @cached_property
    def trained(self) -> Tensor:
        """True where the weight is not 0; bool, shape of ``logprobs``."""
        if self.weights is None:
            return torch.ones_like(self.logprobs, dtype=torch.bool)
        return self.weights != 0

    @cached_property
    def trained_positions(self) -> Tensor:
        """True where any target of the position is trained; bool [N]."""
        return self.trained if self.trained.dim() == 1 else self.trained.any(-1)

    @cached_property
    def weight(self) -> Tensor:
        """The weights, 1 where none were given; float, shape of ``logprobs``."""
        if self.weights is None:
            return torch.ones_like(self.policy)
        return self.weights.to(self.policy.dtype)

    @property
    def policy(self) -> Tensor:
        """``logprobs`` in fp32 or better, 0 where untrained: safe to compute with, connected to every leaf."""
        return self.select(self.logprobs)

    @cached_property
    def tokens_per_sequence(self) -> Tensor:
        """Trained positions of each sequence; int64 [B]."""
        return self.sum_by_sequence(self.trained_positions.to(torch.int64))

    @cached_property
    def weight_per_sequence(self) -> Tensor:
        """Sum of the weights of each sequence; float64 [B]."""
        return self.sum_by_sequence(self.weight.double())

    def select(self, values: Tensor) -> Tensor:
        """Return ``values`` in fp32 or better, exactly 0 (and with zero gradient) where untrained, even from NaN."""
        wide = values if values.dtype == torch.float64 else values.float()
        return torch.where(self.trained, wide, torch.zeros((), dtype=wide.dtype, device=wide.device))

    def masked(self, name: str) -> Tensor:
        """Return an input of the batch, detached, as `select` does.

        Args:
            name: a per-token field, e.g. ``advantages``.

        Raises:
            MissingFieldError: the batch has none.
        """
        values: Tensor | None = getattr(self, name)
        if values is None:
            raise MissingFieldError(
                f"missing required field {_DATUM_KEYS.get(name, name)!r}: the TokenBatch has no {name}"
            )
        return self.select(values.detach())

    def select_tokens(self, at: Tensor) -> TokenBatch:
        """Return a batch of some of the tokens; every sequence stays, with fewer tokens or none.

        Args:
            at: int64 [n]; positions of the tokens, ascending.
        """
        sequence = self.sequence_index[at]
        counts = torch.zeros_like(self.offsets).index_add(0, sequence + 1, torch.ones_like(sequence))
        chosen = {name: self.__dict__[name] for name in _FIELDS}
        for name in ("logprobs", *_TOKEN_FIELDS):
            chosen[name] = None if chosen[name] is None else chosen[name][at]
        # Right by construction; a check of the offsets would wait for the device at every chunk of tokens.
        batch = object.__new__(TokenBatch)
        batch.__dict__.update(chosen, offsets=counts.cumsum(0), sequence_index=sequence)
        return batch

    def with_logprobs(self, logprobs: Tensor) -> TokenBatch:
        """Return the batch with other log-probs of the policy; what does not depend on them is not computed again.

        Raises:
            LengthError: the shape is another one.
        """
        _check_shape("logprobs", logprobs, tuple(self.logprobs.shape), "that of the log-probs in their place")
        batch = copy.copy(self)
        batch.__dict__.pop("weight", None)  # is of the log-probs' dtype
        batch.__dict__["logprobs"] = logprobs
        return batch

    def sum_by_sequence(self, values: Tensor) -> Tensor:
        """Sum packed ``values`` ([N] or [N, K]) within each sequence; [B], dtype of ``values``."""
        flat = values if values.dim() == 1 else values.sum(-1)
        return flat.new_zeros(self.num_sequences).index_add(0, self.sequence_index, flat)

    @cached_property
    def pairs(self) -> Pairs:
        """The preference pairs, by ``pair_id`` and ``role``.

        Without ``pair_id`` neighbours are pairs, without ``role`` too the first of them (2i) is the chosen one.

        Raises:
            IncompleteUnitError: a pair lacks a side, or has one twice.
        """
        if self.pair_id is None:
            neighbours = _neighbour_pairs(self.num_sequences, self.offsets.device)
            if self.role is None:
                return neighbours
            return _pairs_by_id(torch.arange(self.num_sequences, device=self.offsets.device) // 2, self.role)
        if self.role is None:
            raise IncompleteUnitError(
                "pair_id is given without role; give role 1 to chosen and 0 to rejected sequences"
            )
        return _pairs_by_id(self.pair_id, self.role)

    @cached_property
    def groups(self) -> Groups:
        """The prompt groups, by ``group_id``; without it all sequences are one group."""
        if self.group_id is None:
            return Groups(torch.zeros_like(self.offsets[1:]), min(1, self.num_sequences))
        ids, index = torch.unique(self.group_id, return_inverse=True)
        return Groups(index, ids.numel())


_FIELDS: Final = tuple(field.name for field in fields(TokenBatch))


def _check_shape(name: str, value: Tensor | None, shape: tuple[int, ...], meaning: str) -> None:
    if value is not None and tuple(value.shape) != shape:
        raise LengthError(f"{name} has shape {tuple(value.shape)}, expected {shape} ({meaning})")


def _tensor(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise DatumError(f"{name} of a TokenBatch must be a tensor, got {type(value).__name__}")
    return value


def _to_device(logprobs: Tensor, inputs: dict[str, Tensor | None]) -> dict[str, Tensor]:
    known = set(_FIELDS) - {"logprobs", "offsets"}
    for name in inputs:
        if name not in known:
            raise TypeError(f"TokenBatch has no input {name!r}; it has {sorted(known)}")
    return {
        name: _tensor(name, value).detach().to(logprobs.device) for name, value in inputs.items() if value is not None
    }


def _neighbour_pairs(sequences: int, device: torch.device) -> Pairs:
    if sequences % 2:
        raise IncompleteUnitError(
            f"{sequences} sequences do not make whole pairs (2i chosen, 2i + 1 rejected): sequence {sequences - 1} "
            "has no partner; add it, or give pair_id and role"
        )
    chosen = torch.arange(0, sequences, 2, device=device)
    return Pairs(chosen, chosen + 1)


def _pairs_by_id(pair_id: Tensor, role: Tensor) -> Pairs:
    ids, index = torch.unique(pair_id, return_inverse=True)
    sides = []
    for side, side_name in ((ROLE_CHOSEN, "chosen"), (ROLE_REJECTED, "rejected")):
        count = torch.zeros_like(ids).index_add(0, index, (role == side).to(ids.dtype))
        if bool((count != 1).any()):
            wrong = dict(zip(ids[count != 1].tolist(), count[count != 1].tolist(), strict=True))
            raise IncompleteUnitError(f"a pair has exactly one {side_name} sequence in a call; by pair_id: {wrong}")
        members = (role == side).nonzero().squeeze(1)
        sides.append(members[index[members].argsort()])
    return Pairs(sides[0], sides[1])
