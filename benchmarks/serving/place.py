"""The service that the benchmark measures, how much is asked of it, and the table of what came out."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, final

import pullback
from pullback import AdamParams, Datum, TorchBackend
from pullback.backends.native.models.lora import LoraChoice
from pullback.service import Base

from ..models import batch
from .load import Measured

__all__ = ["KEYS", "STEP", "Place", "Sizes", "table"]

KEYS: Final = ("tml-first", "tml-second")
STEP: Final = AdamParams(learning_rate=1e-7)  # the weights stay where they are, for all practical purposes
_LORA: Final = LoraChoice(rank=8)


@final
@dataclass(frozen=True)
class Sizes:
    """How much is asked for.

    Attributes:
        clients: numbers of clients that train at once.
        steps: of each client.
        sequences, length: of a light step; tokens.
        heavy, heavy_length: of a heavy call.
        behind: heavy calls that stand before a light step.
        completions, max_tokens: of each prompt of the RL loop.
        operations: of the long run.
        rounds: of everything but the long run.
    """

    clients: Sequence[int] = (1, 4, 16)
    steps: int = 20
    sequences: int = 4
    length: int = 32
    heavy: int = 64
    heavy_length: int = 256
    behind: int = 20
    completions: int = 8
    max_tokens: int = 16
    operations: int = 3000
    rounds: int = 3


@final
@dataclass(frozen=True, eq=False)
class Place:
    """The service that is measured, and the model that it serves.

    Attributes:
        url: base URL; its keys are ``KEYS``.
        pid: its process.
        base: the model.
    """

    url: str
    pid: int
    base: Base

    @contextmanager
    def client(self, key: str = KEYS[0], url: str | None = None) -> Iterator[Any]:
        """Connect, with a fresh adapter."""
        options = {"seed": _LORA.seed}
        backend = pullback.connect(
            url or self.url, base_model=self.base.name, rank=_LORA.rank, api_key=key, lora=options
        )
        with backend:
            yield backend

    def native(self) -> TorchBackend:
        """Return the same model without a service."""
        return TorchBackend(self.base.adapted(_LORA), **self.base.options)

    def batch(self, sequences: int, length: int) -> list[Datum]:
        """Return random sequences."""
        vocab = int(getattr(self.base.model, "config").vocab_size)  # noqa: B009  # of any model of transformers
        return batch([length] * sequences, vocab, prompt_share=0.0)


def table(case: str, words: str, found: Mapping[str, Sequence[Measured]], baseline: str) -> dict[str, Any]:
    """Print medians over the rounds, ratios being those of paired rounds; return them."""
    print(f"\n{case}  {words}\n  {'':28}{'a second':>10}{'p50 ms':>10}{'p95 ms':>10}{'rate':>8}{'p50':>8}{'p95':>8}")
    rows: dict[str, Any] = {}
    for name, rounds in found.items():
        middle = statistics.median
        row = {
            "rate": middle(r.rate for r in rounds),
            "p50": middle(r.quantile(50) for r in rounds),
            "p95": middle(r.quantile(95) for r in rounds),
            "longest": max(max(r.latencies) for r in rounds),
        }
        pairs = list(zip(rounds, found[baseline], strict=True))
        row["rate ratio"] = middle(a.rate / b.rate for a, b in pairs)
        for percent in (50, 95):
            row[f"p{percent} ratio"] = middle(a.quantile(percent) / b.quantile(percent) for a, b in pairs)
        ratios = "".join(f"{row[f'{key} ratio']:8.2f}" for key in ("rate", "p50", "p95"))
        print(f"  {name:28}{row['rate']:10.2f}{1e3 * row['p50']:10.2f}{1e3 * row['p95']:10.2f}{ratios}", flush=True)
        rows[name] = row
    return {"case": case, "baseline": baseline, "rows": rows}
