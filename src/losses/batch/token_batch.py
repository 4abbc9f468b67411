"""TokenBatch: what a loss sees. Tensors only, padded or packed, aligned to the target tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar, final

import torch
from torch import Tensor

from ...deprecation import renamed_keyword, replaced
from ..inputs import INPUTS, as_inputs, check_inputs, check_shape, label_problems, missing_input, require_tensor
from .labels import mask_of_labels
from .layout import Layout, Packed, Padded, count_of, count_trained
from .problems import Problem, raise_readable
from .remembered import forget_overwritten, kept_sum
from .selection import as_weight, finite, select, wide
from .sums import row_sum, weighted_sum
from .units import Groups, PairOrder, Pairs, group_sequences, pair_inputs, pair_sequences, require_even

__all__ = ["TokenBatch"]

Cached = TypeVar("Cached")


@final
@dataclass(frozen=True, eq=False)
class TokenBatch:
    """B sequences of tokens with all that a loss reads of them; made by `from_padded` or `from_packed`.

    Args:
        logprobs: current policy's log-prob of each target token, nats; [B, T] or [N] by the layout, with [.., K] for
            soft targets.
        layout: how the sequences lie in it.
        weights: shape of ``logprobs``, float or bool; 0 = not trained. Absent: every token has weight 1.
        advantages: one per token, or [B, 1] in a padded batch; positive = more of this token.
        rollout_logprobs: the rollout policy's (the sampler's) log-probs, in datums the key ``logprobs``.
        old_logprobs: the proximal anchor, where it differs from the sampler.
        ref_logprobs: the frozen reference's log-probs.
        sequence_ratio_mask: the tokens over which a sequence's ratio is taken, where not the trained ones.
        pair_id, role, group_id, label, reference_point: int64 [B], the last one float; see `pullback.losses.batch.keys`.
        ref_logprob_sums: float [B], weighted sums of ``ref_logprobs``, in place of them for a loss that needs no more.

    Raises:
        LengthError: a tensor has another shape than its place demands.
    """

    logprobs: Tensor
    layout: Layout
    weights: Tensor | None = None
    advantages: Tensor | None = None
    rollout_logprobs: Tensor | None = None
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    sequence_ratio_mask: Tensor | None = None
    pair_id: Tensor | None = None
    role: Tensor | None = None
    group_id: Tensor | None = None
    label: Tensor | None = None
    reference_point: Tensor | None = None
    ref_logprob_sums: Tensor | None = None
    _inputs: tuple[Tensor, ...] = field(init=False, repr=False)
    _known: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    _computed: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        given = {name: value for name in INPUTS if (value := getattr(self, name)) is not None}
        object.__setattr__(self, "_inputs", tuple(given.values()))
        check_inputs(given, tuple(self.logprobs.shape), self.num_sequences, self.layout.candidates)
        raise_readable(label_problems(self.weights))
        self.refresh()

    @classmethod
    @renamed_keyword("behaviour_logprobs", "rollout_logprobs")
    def from_packed(cls, logprobs: Tensor, lengths: Tensor | list[int], **inputs: Tensor | None) -> TokenBatch:
        """Build from packed tensors.

        Args:
            logprobs: [N] or [N, K].
            lengths: tokens of each sequence, int64 [B]; they add up to N.
            inputs: the other fields of `TokenBatch`.

        Raises:
            LengthError: a shape is wrong, or the lengths do not add up.
        """
        layout = Packed.of(require_tensor("logprobs", logprobs), lengths)
        return cls(logprobs, layout, **as_inputs(logprobs, inputs))

    @classmethod
    @renamed_keyword("behaviour_logprobs", "rollout_logprobs")
    def from_padded(
        cls, logprobs: Tensor, weights: Tensor, *, pairs: PairOrder | Tensor | None = None, **inputs: Tensor | None
    ) -> TokenBatch:
        """Build from right- or left-padded tensors; padding is a position of weight 0.

        Args:
            logprobs: [B, T] or [B, T, K]; ``logprobs[b, j]`` scores the token that ``weights[b, j]`` weighs.
            weights: the same shape, float or bool; 0 on padding and on prompts.
            pairs: how preference pairs lie: ``interleaved`` (2i chosen, 2i + 1 rejected) or ``stacked`` (all chosen ones,
                then all rejected ones, as in TRL), in place of ``pair_id`` and ``role``.
            inputs: the other fields of `TokenBatch`, [B, T]; ``advantages`` may be [B] (one per sequence);
                what is one number per sequence, e.g. ``pair_id`` or ``ref_logprob_sums``, is [B].

        Raises:
            LengthError, IncompleteUnitError: a shape is wrong, or ``pairs`` are of an odd number of sequences.
            ConfigError: ``pairs`` is no such word, or is given beside ``pair_id`` or ``role``.
        """
        layout = Padded(require_tensor("logprobs", logprobs).shape)
        order = pair_inputs(pairs, layout.rows, logprobs.device, inputs)
        known = as_inputs(logprobs, {"weights": weights, **inputs, **order})
        if "advantages" in known and known["advantages"].shape == (layout.rows,):
            known["advantages"] = layout.spread(known["advantages"], logprobs.dim())
        return cls(logprobs, layout, **known)

    @classmethod
    def from_labels(
        cls, logprobs: Tensor, labels: Tensor, *, pairs: PairOrder | Tensor | None = None, **inputs: Tensor | None
    ) -> TokenBatch:
        """Build from a trainer's labels, which are -100 where nothing is trained.

        Args:
            logprobs: [B, T], one per label but the first, whose token nothing precedes; see `pullback.ops.logprobs_of`.
            labels: int64 [B, T + 1], as transformers has them; or [B, T] if they are shifted already.
            pairs, inputs: see `from_padded`; per-token inputs have the shape of ``logprobs``.

        Raises:
            LengthError: a shape is wrong.
            DatumError: a label is neither a token id nor -100.
        """
        return cls.from_padded(logprobs, mask_of_labels(logprobs, labels), pairs=pairs, **inputs)

    @property
    @replaced("losses.TokenBatch.rollout_logprobs")
    def behaviour_logprobs(self) -> Tensor | None:
        """Deprecated spelling of ``rollout_logprobs``."""
        return self.rollout_logprobs

    @property
    def num_sequences(self) -> int:
        """B."""
        return self.layout.rows

    @property
    def weight(self) -> Tensor:
        """The weights, 1 where none were given; fp32 or better, shape of ``logprobs``."""
        return self.remember("weight", lambda: as_weight(self.weights, wide(self.logprobs)))

    @property
    def mask(self) -> Tensor | None:
        """`weight`, whose zeros are what is not trained; None where everything is."""
        return None if self.weights is None else self.weight

    @property
    def scale(self) -> Tensor | None:
        """`weight`, where it is more than a mask: what values are multiplied by; else None."""
        return None if self.weights is None or self.weights.dtype == torch.bool else self.weight

    @property
    def trained(self) -> Tensor:
        """True where the weight is not 0; bool, shape of ``logprobs``."""
        return self.remember("trained", lambda: self.weight != 0)

    @property
    def trained_positions(self) -> Tensor:
        """True where any target of the position is trained; bool, one per token."""
        return self.trained.any(-1) if self.layout.candidates else self.trained

    @property
    def policy(self) -> Tensor:
        """``logprobs`` in fp32 or better, 0 where untrained: safe to compute with, connected to every leaf."""
        return self.select(self.logprobs)

    @property
    def tokens_per_sequence(self) -> Tensor:
        """Trained positions of each sequence; float64 [B]."""
        return self.remember("tokens_per_sequence", lambda: self.layout.row_counts(self.indicator()))

    @property
    def weight_per_sequence(self) -> Tensor:
        """Sum of the weights of each sequence; float64 [B]."""
        if self.scale is None and not self.layout.candidates:
            return self.tokens_per_sequence
        return self.remember("weight_per_sequence", lambda: self.layout.row_counts(self.weight))

    @property
    def token_count(self) -> Tensor:
        """How many positions are trained; float64, 0-d."""
        weights = None if self.scale is None or self.layout.candidates else self.weight
        return self.remember("token_count", lambda: count_trained(weights, self.indicator))

    @property
    def trained_count(self) -> Tensor:
        """How many log-probs are trained, candidates counted one by one; float64, 0-d."""
        if not self.layout.candidates:
            return self.token_count
        return self.remember("trained_count", lambda: count_of(self.kept))

    @property
    def kept(self) -> Tensor:
        """1 where trained, else 0; dtype and shape of `weight`. (A comparison writes bool, whose sum is slow on the CPU.)"""
        if self.scale is None:
            return self.weight
        return self.remember("kept", lambda: select(self.weight.new_ones(()).expand(self.layout.shape), self.weight))

    def indicator(self) -> Tensor:
        """Return 1 at the positions of which any target is trained, else 0; the dtype of `weight`, one per token."""
        return self.trained_positions.to(self.weight.dtype) if self.layout.candidates else self.kept

    def select(self, values: Tensor) -> Tensor:
        """Return ``values`` in fp32 or better, exactly 0 (and with zero gradient) where untrained, even from NaN."""
        return select(wide(values), self.mask)

    def given(self, name: str) -> Tensor:
        """Return a per-token input of the batch as it is, detached, in fp32 or better.

        Raises:
            MissingFieldError: the batch has none.
        """
        values: Tensor | None = getattr(self, name)
        if values is None:
            raise missing_input(name, self)
        return wide(values)

    def weighted_row_sum(self, relative_to: str | None = None) -> Tensor:
        """Return ``sum_t w_t (logprob_t - other_t)`` of each sequence; float64 [B], differentiable in the log-probs.

        Args:
            relative_to: the field of the other log-probs, e.g. ``ref_logprobs`` (or `ref_logprob_sums` for it); None for 0.
        """
        if relative_to == "ref_logprobs" and self.ref_logprob_sums is not None:
            return self.weighted_row_sum() - self.ref_logprob_sums

        def sums(x: Tensor) -> Tensor:
            minus = None if relative_to is None else self.given(relative_to)
            return row_sum(x, minus, self.mask, self.scale, self.layout)

        return kept_sum(self._computed, f"row sums relative to {relative_to}", self.logprobs, sums)

    def negative_log_likelihood(self) -> Tensor:
        """Return ``-sum_t w_t logprob_t`` of all tokens; 0-d, fp32 or better, differentiable in the log-probs."""
        return kept_sum(self._computed, "nll", self.logprobs, lambda x: weighted_sum(x, self.mask, self.scale, -1.0))

    def shown_finite(self) -> bool:
        """Return whether a sum of all trained log-probs has been taken, and is finite: then so is each of them."""
        return any(finite(total) for total in self._computed.values())

    def detached(self) -> TokenBatch:
        """Return the batch without the graph of its log-probs, for metrics; what has been summed is not summed again."""
        return self._with(logprobs=self.logprobs.detach())

    def _with(self, **fields: Any) -> TokenBatch:
        batch = object.__new__(TokenBatch)
        batch.__dict__.update(self.__dict__, **fields)
        return batch

    def with_logprobs(self, logprobs: Tensor) -> TokenBatch:
        """Return the batch with other log-probs of the policy; what does not depend on them is not computed again.

        Raises:
            LengthError: the shape is another one.
        """
        check_shape("logprobs", logprobs, tuple(self.logprobs.shape), "that of the log-probs in their place")
        self.refresh()
        known = self._known if wide(logprobs).dtype == wide(self.logprobs).dtype else {}
        return self._with(logprobs=logprobs, _known=known, _computed={})

    @property
    def pairs(self) -> Pairs:
        """The preference pairs, by ``pair_id`` and ``role``; see `pair_sequences`."""
        made_of = self.num_sequences, self.pair_id, self.role, self.logprobs.device
        return self.remember("pairs", lambda: pair_sequences(*made_of))[0]

    @property
    def neighbours_are_pairs(self) -> bool:
        """Whether the pairs are sequences 2p, the chosen one, and 2p + 1; an odd number of sequences is refused."""
        if found := self.role is None and self.pair_id is None:
            require_even(self.num_sequences)
        return found

    @property
    def groups(self) -> Groups:
        """The prompt groups, by ``group_id``; without it all sequences are one group."""
        return self.remember("groups", lambda: group_sequences(self.num_sequences, self.group_id, self.logprobs.device))

    def problems(self) -> list[Problem]:
        """Return what may be wrong with the batch but cannot be looked at for nothing."""
        paired = self._known["pairs"][1] if "pairs" in self._known else None
        found = [*label_problems(self.weights), self.layout.problem(), paired]
        return [problem for problem in found if problem is not None]

    def refresh(self) -> None:
        """Forget what was computed of inputs into whose memory something else has been written since."""
        forget_overwritten(self._known, self._inputs)

    def remember(self, name: str, compute: Callable[[], Cached]) -> Cached:
        """Return what was computed under a name before, else compute it; for what does not depend on the log-probs."""
        if name not in self._known:
            self._known[name] = compute()
        return self._known[name]  # type: ignore[no-any-return]
