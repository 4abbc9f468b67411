"""What keeps the state of the rows that are decoded, and gives the logits of their next tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, final

import torch
from torch import Tensor

from ....ops.logprobs import head_logits
from ..execution.forward import model_device
from .requests import Text

__all__ = ["Decoder", "PlainDecoder"]


class Decoder(Protocol):
    """The state of a set of rows, in order."""

    @property
    def bytes_per_token(self) -> int:
        """Memory that a row takes for each of its tokens; 0 = not known before the first."""
        ...

    def join(self, texts: Sequence[Text], copies: Sequence[int]) -> Tensor:
        """Read texts and add rows after those that are there: ``copies[i]`` rows of ``texts[i]``, each text's together.

        Args:
            texts: each is read, and goes on, by its own model.
            copies: at least 1 each.

        Returns:
            The new rows' next-token logits, [sum of copies, V].
        """
        ...

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append a token to each row and return their logits, [R, V]."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, ascending; none: forget everything."""
        ...


@final
class PlainDecoder:
    """Runs each whole row again at every step: for any models, at quadratic cost."""

    bytes_per_token = torch.int64.itemsize

    def __init__(self) -> None:
        self._rows: list[Text] = []

    def join(self, texts: Sequence[Text], copies: Sequence[int]) -> Tensor:
        moved = [Text(text.model, text.tokens.to(model_device(text.model))) for text in texts]
        self._rows += [text for text, count in zip(moved, copies, strict=True) for _ in range(count)]
        logits = self._logits(moved)
        return logits.repeat_interleave(torch.tensor(copies, device=logits.device), 0)

    def step(self, tokens: Sequence[int]) -> Tensor:
        self._rows = [
            Text(row.model, torch.cat([row.tokens, row.tokens.new_tensor([token])]))
            for row, token in zip(self._rows, tokens, strict=True)
        ]
        return self._logits(self._rows)

    def keep(self, rows: Sequence[int]) -> None:
        self._rows = [self._rows[i] for i in rows]

    def _logits(self, rows: Sequence[Text]) -> Tensor:
        heads, logits = {row.model: row.model.head() for row in rows}, []
        for row in rows:
            positions = torch.arange(len(row), device=row.tokens.device)[None]
            hidden = row.model.hidden_states(row.tokens[None], positions)[:, -1]
            logits.append(head_logits(hidden, heads[row.model]))
        return torch.cat(logits)
