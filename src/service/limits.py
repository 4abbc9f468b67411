"""What one client may ask of a service: keys, sizes, counts."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Self, final

from ..datums.types import Datum
from ..errors import ConfigError, DatumError, TooLargeError

__all__ = ["Keys", "Limits", "check_prompt", "digest_of"]


@final
@dataclass(frozen=True)
class Limits:
    """Sizes and counts.

    Args:
        body_bytes: of a request with datums, after decompression; others are far smaller.
        all_bodies_bytes: of all requests together that are being read, or whose datums wait for their turn; as objects,
            large JSON counts three times.
        datums, tokens: of one operation.
        queue: operations that may wait or run.
        waiting: of these, one key's that wait for a missing number; at most half of what it may queue.
        models, samplers, losses: that are kept in memory; losses are those made by ``create_custom_loss``.
        queue_per_key, models_per_key, samplers_per_key, losses_per_key: of these, one key's; None = see ``shared``.
        disk_per_key: bytes of one key's checkpoints; None = see ``shared``.
        answer_bytes: of answers that are kept for a day; beyond it, the oldest go of the key that has most.
        shared: several keys use the server: one may have more only while it holds less than is left free.
        rank: of an adapter.
        samples: completions of one request.
        graph_bytes: graphs kept for custom losses; None = half of what is free when they are made.
        graph_seconds: how long they are kept.
        idle_seconds: a session silent for so long may lose its models to a new one.
        gap_seconds: how long operations wait for a missing number.
        poll_seconds: how long a request for a result waits before it must be asked for again.
        connections: that may be open; where one more comes, one that waits for its client is closed.
        header_seconds: until a request's headers must be whole.
        body_seconds: in which a part of a body must come (480 kB, or the rest).
        shutdown_seconds: that a stop waits for requests that are being answered.
        large_bytes: of a result: a client that can is told its size first, and asks for it when it has room.

    Raises:
        ConfigError: a count below 1, or a time below 0.
    """

    body_bytes: int = 256_000_000
    all_bodies_bytes: int = 1_000_000_000
    datums: int = 8192
    tokens: int = 4_000_000
    queue: int = 1024
    waiting: int = 256
    models: int = 32
    samplers: int = 256
    losses: int = 1024
    queue_per_key: int | None = None
    models_per_key: int | None = None
    samplers_per_key: int | None = None
    losses_per_key: int | None = None
    disk_per_key: int | None = None
    answer_bytes: int = 10_000_000_000
    shared: bool = False
    rank: int = 512
    samples: int = 1024
    graph_bytes: float | None = None
    graph_seconds: float = 60.0
    idle_seconds: float = 3600.0
    gap_seconds: float = 60.0
    poll_seconds: float = 30.0
    large_bytes: int = 1_000_000
    connections: int = 1000
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    shutdown_seconds: float = 10.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 1 if isinstance(value, int) else 0  # counts, and seconds or estimates
            if value is not None and not isinstance(value, bool) and not value >= least:
                raise ConfigError(f"{field.name} must be at least {least}, got {value!r}")

    def check_data(self, data: Sequence[Datum], context: int | None = None) -> None:
        """Check the size of one operation.

        Args:
            data: its datums.
            context: longest text that the model takes, tokens; None = any.

        Raises:
            TooLargeError: there is too much in it.
            DatumError: a datum is longer than the context.
        """
        if len(data) > self.datums:
            raise TooLargeError(f"{len(data)} datums in one operation; this server takes at most {self.datums}")
        tokens = sum(len(datum.model_input) for datum in data)
        if tokens > self.tokens:
            raise TooLargeError(f"{tokens} tokens in one operation; this server takes at most {self.tokens}")
        for i, datum in enumerate(data):
            if context is not None and len(datum.model_input) > context:
                raise DatumError(f"datum {i} has {len(datum.model_input)} tokens; this model's context is {context}")


def check_prompt(prompt: int, max_tokens: object, context: int | None) -> None:
    """Check that a completion fits the model's context.

    Args:
        prompt: tokens that it goes on from.
        max_tokens: that are asked for; None = as many as fit.
        context: longest text that the model takes, tokens; None = any.

    Raises:
        ConfigError: they do not fit together.
    """
    if context is None:
        return
    if prompt > context:
        raise ConfigError(f"the prompt has {prompt} tokens; this model's context is {context}")
    # Of a prompt that is scored only, one token is sampled and not read again.
    if isinstance(max_tokens, int) and max_tokens > 1 and prompt + max_tokens > context:
        raise ConfigError(
            f"a prompt of {prompt} tokens and max_tokens {max_tokens} make {prompt + max_tokens}; this model's context is "
            f"{context}"
        )


@final
class Keys:
    """API keys, kept as digests; the first half of a digest names its owner.

    Args:
        digests: SHA-256, hexadecimal; if there are none, everybody is let in, as one owner.
    """

    def __init__(self, digests: Iterable[str]) -> None:
        self._digests = sorted({digest.strip().lower() for digest in digests if digest.strip()})
        for digest in self._digests:
            if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
                raise ConfigError(
                    f"a key's digest must be 64 hexadecimal digits, got {digest[:8]!r}... of {len(digest)}"
                )

    @classmethod
    def of(cls, keys: Iterable[str]) -> Self:
        """Return the keys that are given in plain text."""
        return cls(digest_of(key) for key in keys)

    def __len__(self) -> int:
        return len(self._digests)

    def owner(self, key: str) -> str | None:
        """Return the owner of a key, in time that does not depend on the key; None if it has none."""
        if not self._digests:
            return ""
        given, owner = digest_of(key), None
        for digest in self._digests:
            if hmac.compare_digest(given, digest):
                owner = digest[:32]
        return owner


def digest_of(key: str) -> str:
    """SHA-256 of a key; keys are long and random, so a slow hash would protect nothing."""
    return hashlib.sha256(key.encode()).hexdigest()
