"""A request for completions of one prompt, and each of these completions while it grows."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from ....errors import BackendError
from ...sampling import row_uniforms
from ...types import SamplingParams
from ..causal_lm import CausalLM

__all__ = ["Ends", "GenerationRequest", "Row", "Text"]

Ends = Callable[[Sequence[int]], bool]


@final
@dataclass(frozen=True, eq=False)
class Text:
    """Tokens, and the model that reads them.

    Attributes:
        model: whose text it is.
        tokens: int64 [L], on the CPU.
    """

    model: CausalLM
    tokens: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def content(self) -> bytes:
        """The tokens, so that they can be looked up."""
        return self.tokens.numpy().tobytes()

    @property
    def key(self) -> tuple[CausalLM, bytes]:
        """What equal texts have in common."""
        return self.model, self.content


@final
@dataclass(eq=False)
class GenerationRequest:
    """Completions of one prompt that a batch was asked for.

    Args:
        model: that completes it.
        prompt: int64 [T], on the CPU.
        n: how many completions.
        params: how they are sampled; the seed is not read.
        seed: row i's own random numbers follow from it and from i, so that neither other rows nor the time at which a row
            is decoded changes what it samples.
        stop: tokens that end a completion.
        ends: says of a completion's tokens whether they end it too.
        owner: whose request it is; owners share a batch fairly.

    Attributes:
        rows: those that have begun, in order.
        error: why there will be no completions; None while all is well.
    """

    model: CausalLM
    prompt: Tensor
    n: int
    params: SamplingParams
    seed: int
    stop: frozenset[int] = frozenset()
    ends: Ends | None = None
    owner: str = ""
    rows: list[Row] = field(default_factory=list)
    error: Exception | None = None
    _returned: list[Row] = field(default_factory=list)
    _unfinished: int = -1

    def __post_init__(self) -> None:
        self._unfinished = self.n

    @property
    def done(self) -> bool:
        """Whether all completions have ended, or there will be none."""
        return self.error is not None or self._unfinished == 0

    @property
    def waits(self) -> bool:
        """Whether a row of it has yet to enter the batch."""
        return self.error is None and (len(self.rows) < self.n or bool(self._returned))

    @property
    def next_text(self) -> Text:
        """The text of the row that would enter next."""
        return self._returned[-1].text if self._returned else Text(self.model, self.prompt)

    def enter(self) -> Row:
        """Return the row that enters next: one that had to leave, or the next one that has not begun."""
        if self._returned:
            return self._returned.pop()
        self.rows.append(Row(self, row_uniforms(self.seed, len(self.rows))))
        return self.rows[-1]

    def give_back(self, row: Row) -> None:
        """Let a row wait again, with what it has so far."""
        self._returned.append(row)

    def fail(self, error: Exception) -> None:
        """End the request without completions; the first error counts."""
        if not self.done:
            self.error = error
        self._returned.clear()

    def result(self) -> list[Row]:
        """Return the completions.

        Raises:
            Exception: what `fail` was given.
        """
        if self.error is not None:
            raise self.error
        return self.rows

    def row_ended(self) -> None:
        """Count a row that has ended."""
        self._unfinished -= 1


@final
@dataclass(eq=False)
class Row:
    """One completion.

    Attributes:
        tokens: sampled so far.
        logprobs: of each token under the untempered policy.
        tempered: the same under the tempered policy, not cut.
        stop_reason: ``stop`` or ``length``; None while it grows.
    """

    request: GenerationRequest
    uniforms: random.Random
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tempered: list[float] = field(default_factory=list)
    stop_reason: str | None = None

    @property
    def alive(self) -> bool:
        """Whether it goes on growing."""
        return self.stop_reason is None and self.request.error is None

    @property
    def length(self) -> int:
        """Tokens of the prompt and of the completion so far."""
        return len(self.request.prompt) + len(self.tokens)

    @property
    def text(self) -> Text:
        """The prompt and the completion so far."""
        prompt = self.request.prompt
        return Text(self.request.model, torch.cat([prompt, torch.tensor(self.tokens)]) if self.tokens else prompt)

    def take(self, token: int, logprob: float, tempered: float) -> None:
        """Append a token, and see whether it ends the completion; a log-prob that is not a number fails the request."""
        if logprob != logprob:
            self.request.fail(
                BackendError("the model's logits are not finite: its weights are damaged or have diverged")
            )
            return
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.tempered.append(tempered)
        try:
            stopped = token in self.request.stop or (self.request.ends is not None and self.request.ends(self.tokens))
        except Exception as error:  # the caller's own function
            self.request.fail(error)
            return
        if stopped or len(self.tokens) >= self.request.params.max_tokens:
            self.stop_reason = "stop" if stopped else "length"
            self.request.row_ended()
