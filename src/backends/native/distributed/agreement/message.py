"""What one rank says when all of them meet."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from .....errors import NonFiniteError

__all__ = ["FINE", "OUT_OF_MEMORY", "Message"]

_TEXT: Final = 1024  # bytes of each text of a message
_DIGEST: Final = 32  # bytes
FINE, OUT_OF_MEMORY, FAILED, REFUSED = range(4)
# What a rank raises that has met, in its share of the data, what one process would have refused; files are its own affair.
_REFUSALS: Final = (ValueError, TypeError, KeyError, NonFiniteError)


@final
@dataclass(frozen=True)
class Message:
    """What one rank says.

    Attributes:
        outcome: of the work since they last met.
        stage: where this rank is.
        digest, text: of what must be the same everywhere.
        error: why the work has failed.
    """

    outcome: int
    stage: str
    digest: bytes = b""
    text: str = ""
    error: str = ""

    @classmethod
    def of_failure(cls, error: BaseException, stage: str, text: str = "") -> Message:
        """Return what a rank says whose work has failed."""
        refuses = isinstance(error, _REFUSALS) and not isinstance(error, OSError)
        return cls(REFUSED if refuses else FAILED, stage, text=text, error=f"{type(error).__name__}: {error}")

    @property
    def failed(self) -> bool:
        """Whether the work has failed, for whatever reason, except that memory ran out."""
        return self.outcome in (FAILED, REFUSED)

    @property
    def refusal(self) -> str | None:
        """The words of an error that refuses what all ranks were given; None: there is none."""
        return self.error.partition(": ")[2] if self.outcome == REFUSED else None

    def to_tensor(self) -> Tensor:
        """Return uint8 [1 + 32 + 3 x _TEXT]."""
        texts = [_padded(text) for text in (self.stage, self.text, self.error)]
        raw = bytes([self.outcome]) + self.digest.ljust(_DIGEST, b"\0") + b"".join(texts)
        return torch.frombuffer(bytearray(raw), dtype=torch.uint8)

    @classmethod
    def of(cls, tensor: Tensor) -> Message:
        """Read what `to_tensor` wrote."""
        raw, start = tensor.numpy().tobytes(), 1 + _DIGEST
        stage, text, error = (
            raw[start + i * _TEXT : start + (i + 1) * _TEXT].rstrip(b"\0").decode(errors="ignore") for i in range(3)
        )
        return cls(raw[0], stage, raw[1:start], text, error)


def _padded(text: str) -> bytes:
    """Return the bytes of a text; one that is too long ends with its digest."""
    raw = text.encode()
    if len(raw) > _TEXT:
        raw = raw[: _TEXT - 20] + b"... " + hashlib.sha256(raw).hexdigest()[:16].encode()
    return raw.ljust(_TEXT, b"\0")
