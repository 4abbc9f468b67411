"""What keeps the state of the rows that are decoded, and gives the logits of their next tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, final

import torch
from torch import Tensor

from ....ops.logprobs import head_logits
from ..causal_lm import CausalLM
from ..execution.forward import model_device

__all__ = ["Decoder", "PlainDecoder"]


class Decoder(Protocol):
    """The state of a set of rows, in order."""

    @property
    def bytes_per_token(self) -> int:
        """Memory that a row takes for each of its tokens; 0 = not known before the first."""
        ...

    def join(self, texts: Sequence[Tensor], copies: Sequence[int]) -> Tensor:
        """Read texts and add rows after those that are there: ``copies[i]`` rows of ``texts[i]``, each text's together.

        Args:
            texts: int64 [L], on the CPU.
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
    """Runs each whole row again at every step: for any model, at quadratic cost."""

    bytes_per_token = torch.int64.itemsize

    def __init__(self, model: CausalLM) -> None:
        self._model, self._device = model, model_device(model)
        self._rows: list[Tensor] = []

    def join(self, texts: Sequence[Tensor], copies: Sequence[int]) -> Tensor:
        moved = [text.to(self._device) for text in texts]
        self._rows += [text for text, count in zip(moved, copies, strict=True) for _ in range(count)]
        return self._logits(moved).repeat_interleave(torch.tensor(copies, device=self._device), 0)

    def step(self, tokens: Sequence[int]) -> Tensor:
        added = torch.tensor(tokens, device=self._device)
        self._rows = [torch.cat([row, token[None]]) for row, token in zip(self._rows, added, strict=True)]
        return self._logits(self._rows)

    def keep(self, rows: Sequence[int]) -> None:
        self._rows = [self._rows[i] for i in rows]

    def _logits(self, rows: Sequence[Tensor]) -> Tensor:
        last = []
        for row in rows:
            positions = torch.arange(row.numel(), device=row.device)[None]
            last.append(self._model.hidden_states(row[None], positions)[0, -1])
        return head_logits(torch.stack(last), self._model.head())
