"""Rows that are decoded by one decoder: which of them are in it, and one step of all of them."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final, final

import torch
from torch import Tensor

from ...sampling import RowParams, choose_tokens
from .decoders import Decoder
from .requests import GenerationRequest, Row, Text

__all__ = ["Lane", "LaneLimits"]

_MARGIN: Final = 32  # tokens that every row can grow by after one has entered
_SHORT: Final = 6  # bits of a length; shorter texts than 64 tokens are read together, whatever their lengths


@final
@dataclass(frozen=True)
class LaneLimits:
    """What a lane holds at once, whatever it is asked for; one row is always let in.

    Args:
        rows: that are decoded together.
        cells: rows times the longest row's tokens.
        memory: bytes that they may take; None = whatever the cells take.
        prefill_tokens: of the texts that are read before one step; one text is always read.
        share: rows that each owner gets at once, if need be by another's rows that wait again; more as rows end.
    """

    rows: int = 128
    cells: int = 1 << 18
    memory: float | None = None
    prefill_tokens: int = 4096
    share: int = 16


@final
class Lane:
    """Rows in a decoder, and the requests that wait for a place in it: each owner's in their order.

    Args:
        decoder: that keeps the rows.
        limits: what it holds at once.
    """

    def __init__(self, decoder: Decoder, limits: LaneLimits) -> None:
        self._decoder, self._limits = decoder, limits
        self._rows: list[Row] = []
        self._waiting: dict[str, deque[GenerationRequest]] = {}
        self._params: RowParams | None = None

    @property
    def alive(self) -> int:
        """Rows that are being decoded."""
        return len(self._rows)

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._rows or self._queues())

    def add(self, request: GenerationRequest) -> None:
        """Let a request wait for its places."""
        self._waiting.setdefault(request.owner, deque()).append(request)

    def step(self) -> None:
        """Give every row one more token: those that are there, and those for which there is a place by now.

        An error of the model ends the requests that have just come, or all if none has; the others are read anew.
        """
        self.tidy()
        self._make_room()
        newcomers = self._enter()
        try:
            self._forward(newcomers)
        except Exception as error:  # whatever a model raises
            for row in newcomers or self._rows:
                row.request.fail(error)
            self._suspend([])
            self._decoder.keep([])
        self.tidy()

    def tidy(self) -> None:
        """Drop the rows of requests that have ended."""
        self._drop([row for row in self._rows if not row.alive])

    def _forward(self, newcomers: Sequence[Row]) -> None:
        """Run the model on every row's last token and on the newcomers' texts, and let each row take a token."""
        logits = [self._decoder.step([row.tokens[-1] for row in self._rows])] if self._rows else []
        for texts, rows in _together(newcomers):
            logits.append(self._decoder.join(texts, [len(same) for same in rows]))
            self._rows += [row for same in rows for row in same]
        if not self._rows:
            return
        if newcomers or self._params is None:
            self._params = RowParams.of([row.request.params for row in self._rows], logits[0])
        _take(self._rows, torch.cat(logits), self._params)

    def _drop(self, rows: Sequence[Row]) -> None:
        if rows:
            gone = {id(row) for row in rows}
            kept = [i for i, row in enumerate(self._rows) if id(row) not in gone]
            self._rows, self._params = [self._rows[i] for i in kept], None
            self._decoder.keep(kept)

    def _queues(self) -> dict[str, deque[GenerationRequest]]:
        """Each owner's requests that wait, after those that no longer do were forgotten."""
        for owner, queue in list(self._waiting.items()):
            while queue and not queue[0].waits:
                queue.popleft()
            if not queue:
                del self._waiting[owner]
        return self._waiting

    def _fits(self, rows: int, longest: int) -> bool:
        limits, each = self._limits, self._decoder.bytes_per_token
        if rows <= 1:
            return True
        if limits.memory is not None and (not each or rows * longest * each > limits.memory):
            return False  # what a token takes is known after the first row
        return rows <= limits.rows and rows * longest <= limits.cells

    def _make_room(self) -> None:
        """Let the newest rows wait again that do not fit any more, and one of whoever has most where another has no share."""
        lengths = [row.length + 1 for row in self._rows]
        rows = list(self._rows)
        while rows and not self._fits(len(rows), max(lengths)):
            rows.pop()
            lengths.pop()
        counts = Counter(row.request.owner for row in rows)
        poorest = min(self._queues(), key=lambda name: counts[name], default=None)
        if poorest is not None and len(rows) >= self._limits.rows and counts[poorest] < self._limits.share:
            richest, most = counts.most_common(1)[0]
            if most > counts[poorest] + 1:
                rows.remove(next(row for row in reversed(rows) if row.request.owner == richest))
        self._suspend(rows)

    def _suspend(self, kept: Sequence[Row]) -> None:
        stay = {id(row) for row in kept}
        leaving = [row for row in self._rows if id(row) not in stay]
        for row in reversed(leaving):  # the oldest enters first again
            queue = self._waiting.setdefault(row.request.owner, deque())
            if row.request not in queue:
                queue.appendleft(row.request)
            row.request.give_back(row)
        self._drop(leaving)

    def _enter(self) -> list[Row]:
        """Return rows for which there is a place, one after another of whoever has fewest."""
        counts = Counter(row.request.owner for row in self._rows)
        longest = max((row.length + 1 for row in self._rows), default=0)
        entering: list[Row] = []
        texts, tokens = set[object](), 0
        while queues := self._queues():
            owner = min(queues, key=lambda name: counts[name])
            text = queues[owner][0].next_text
            longest = max(longest, len(text) + _MARGIN)
            tokens += 0 if text.key in texts else len(text)
            if not self._fits(len(self._rows) + len(entering) + 1, longest):
                break
            if entering and tokens > self._limits.prefill_tokens:
                break
            texts.add(text.key)
            entering.append(queues[owner][0].enter())
            counts[owner] += 1
        return entering


def _together(rows: Sequence[Row]) -> list[tuple[list[Text], list[list[Row]]]]:
    """Group rows by text, and texts by length: each group's texts are read by one forward, each text once."""
    same: dict[object, tuple[Text, list[Row]]] = {}
    for row in rows:
        text = row.text
        same.setdefault(text.key, (text, []))[1].append(row)

    def size(pair: tuple[Text, list[Row]]) -> int:
        return max(_SHORT, len(pair[0]).bit_length())

    groups = [list(pairs) for _, pairs in groupby(sorted(same.values(), key=size), size)]
    return [([text for text, _ in pairs], [rows for _, rows in pairs]) for pairs in groups]


def _take(rows: Sequence[Row], logits: Tensor, params: RowParams) -> None:
    """Choose a token for each row, and give it to the row with its log-probs."""
    chosen = choose_tokens(logits, params, [row.uniforms.random() for row in rows])
    policies = [logits] if params.untempered else [logits, params.tempered(logits)]
    scores = [torch.log_softmax(z, -1).gather(-1, chosen[:, None])[:, 0].tolist() for z in policies]
    for row, token, logprob, tempered in zip(rows, chosen.tolist(), scores[0], scores[-1], strict=True):
        row.take(token, logprob, tempered)
