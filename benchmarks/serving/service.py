"""Many clients of one service: steps a second, waiting times, turns between keys, an RL loop, bytes and memory."""

from __future__ import annotations

import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final, final

import pullback
from pullback import AdamParams, Datum, ModelInput, SamplingParams, TorchBackend
from pullback.backends.native.models.lora import LoraChoice
from pullback.cli.arguments.models import load_named
from pullback.service import Base

from ..models import batch
from ..timing import environment
from .load import Measured, at_once, probing, resident, timed
from .services import own_service, relay

__all__ = ["Place", "Sizes", "run"]

KEYS: Final = ("tml-first", "tml-second")
_PARAMS: Final = AdamParams(learning_rate=1e-7)  # the weights stay where they are, for all practical purposes
_LORA: Final = LoraChoice(rank=8)
_MARKS: Final = (0.1, 0.25, 0.5, 0.75, 1.0)  # of the long run: where memory is read


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


def run(arguments: Any) -> None:
    """Start a service, measure, print."""
    os.environ.setdefault("TINKER_TELEMETRY", "0")  # it would be counted
    sizes = Sizes(
        **{
            name: getattr(arguments, name)
            for name in Sizes.__dataclass_fields__
            if name not in ("clients", "max_tokens")
        },
        clients=tuple(map(int, arguments.clients.split(","))),
    )
    options = {"token_budget": arguments.token_budget}
    base = Base(arguments.model, load_named(arguments.model).model, None, options)
    with own_service(arguments.model, arguments.model, arguments.token_budget, KEYS) as service:
        place = Place(service.url, service.pid, base)
        found = [case(place, sizes) for name, case in CASES.items() if name in arguments.cases.split(",")]
    print(json.dumps({"benchmark": "service", "environment": environment(), "cases": found}))


def many_clients(place: Place, sizes: Sizes) -> dict[str, Any]:
    """Steps of 1, 4 and 16 clients at once, each on an adapter of its own, and of the native backend."""
    data = place.batch(sizes.sequences, sizes.length)
    found: dict[str, list[Measured]] = {}
    with ExitStack() as stack:
        clients = [stack.enter_context(place.client()) for _ in range(max(sizes.clients))]
        works: dict[str, list[Callable[[], object]]] = {
            f"{n} clients" if n > 1 else "1 client": [stepping(client, data) for client in clients[:n]]
            for n in sorted({1, *sizes.clients})
        }
        works["native"] = [stepping(place.native(), data)]
        for works_at_once in works.values():
            at_once(works_at_once, 1)  # the first time does not count
        order = random.Random(0)
        for _ in range(sizes.rounds):
            for name in order.sample(list(works), len(works)):
                found.setdefault(name, []).append(at_once(works[name], sizes.steps))
    words = f"a step on {sizes.sequences} x {sizes.length} tokens"
    return _table("clients", words, {name: found[name] for name in works}, "1 client")


def turns(place: Place, sizes: Sizes) -> dict[str, Any]:
    """A light step of one key behind many heavy calls of another one."""
    heavy, light = place.batch(sizes.heavy, sizes.heavy_length), place.batch(1, sizes.length)
    found: dict[str, list[Measured]] = {}
    with place.client(KEYS[0]) as first, place.client(KEYS[1]) as second:
        step = stepping(second, light)
        step(), first.forward_backward(heavy, "cross_entropy").result()
        for _ in range(sizes.rounds):
            alone = timed(lambda: first.forward_backward(heavy, "cross_entropy").result())
            idle = timed(step)
            sent = [first.forward_backward(heavy, "cross_entropy") for _ in range(sizes.behind)]
            waited, ended = timed(step), sum(future.done() for future in sent)
            for future in sent:
                future.result()
            rows = {"a heavy call alone": alone, "a light step alone": idle, "a light step behind them": waited}
            for name, seconds in rows.items():
                found.setdefault(name, []).append(Measured(seconds, [seconds]))
            first.optim_step(_PARAMS).result()
    words = f"{sizes.behind} calls of {sizes.heavy} x {sizes.heavy_length} tokens before a step of another key"
    table = _table("turns", words, found, "a heavy call alone")
    return {**table, "heavy calls that had ended before": ended}


def reinforcement(place: Place, sizes: Sizes) -> dict[str, Any]:
    """Sample, learn from what was sampled, step; and the same on the native backend."""
    prompts = [datum.model_input for datum in place.batch(2, max(2, sizes.length // 2))]
    found: dict[str, list[Measured]] = {}
    with place.client() as client:
        sides = {"native": place.native(), "service": client}
        for round_ in range(sizes.rounds + 1):
            for name, backend in sides.items():
                for phase, seconds in _loop(backend, prompts, sizes).items():
                    if round_:
                        found.setdefault(f"{name}: {phase}", []).append(Measured(seconds, [seconds]))
    words = f"{len(prompts)} prompts x {sizes.completions} completions of {sizes.max_tokens} tokens"
    return _table("rl", words, found, "native: whole loop")


def _loop(backend: Any, prompts: Sequence[ModelInput], sizes: Sizes) -> dict[str, float]:
    params = SamplingParams(max_tokens=sizes.max_tokens, stop=[])
    began = time.perf_counter()
    rollouts = backend.sample(prompts, sizes.completions, params).result()
    sampled = time.perf_counter()
    data = [_datum(prompts[i // sizes.completions], rollout, i) for i, rollout in enumerate(rollouts)]
    backend.forward_backward(data, "importance_sampling").result()
    learned = time.perf_counter()
    backend.optim_step(_PARAMS).result()
    ended = time.perf_counter()
    phases = {"sample": sampled - began, "forward_backward": learned - sampled, "optim_step": ended - learned}
    return {**phases, "whole loop": ended - began}


def _datum(prompt: ModelInput, rollout: Any, place: int) -> Datum:
    before = len(prompt) - 1
    tokens = [*prompt.tokens.tolist(), *rollout.tokens]
    trained, sign = [0.0] * before + [1.0] * len(rollout.tokens), 1.0 if place % 2 else -1.0
    inputs: dict[str, Any] = {
        "target_tokens": tokens[1:],
        "weights": trained,
        "advantages": [sign * w for w in trained],
        "logprobs": [0.0] * before + list(rollout.logprobs),
    }
    return Datum(ModelInput.from_ints(tokens[:-1]), inputs)


def health(place: Place, sizes: Sizes) -> dict[str, Any]:
    """The time of ``healthz`` while nothing else is asked for, and while many clients train."""
    data = place.batch(sizes.sequences, sizes.length)
    found: dict[str, list[Measured]] = {}
    with ExitStack() as stack:
        clients = [stack.enter_context(place.client()) for _ in range(max(sizes.clients))]
        works = [stepping(client, data) for client in clients]
        at_once(works, 1)
        for _ in range(sizes.rounds):
            with probing(place.url, KEYS[0]) as idle:
                time.sleep(sizes.steps / 20)
            with probing(place.url, KEYS[0]) as loaded:
                at_once(works, sizes.steps)
            for name, latencies in (("idle", idle), (f"{len(works)} clients train", loaded)):
                found.setdefault(name, []).append(Measured(sum(latencies), latencies))
    return _table("healthz", "one request after another", found, "idle")


def endurance(place: Place, sizes: Sizes) -> dict[str, Any]:
    """Bytes on the wire and memory of the service over many operations of one client."""
    data = place.batch(sizes.sequences, sizes.length)
    marks = {int(share * sizes.operations / 2) for share in _MARKS}
    memory: dict[int, int] = {}
    with relay(place.url) as (url, wire), place.client(url=url) as client:
        step = stepping(client, data)
        step()
        wire.take()
        for done in range(1, sizes.operations // 2 + 1):
            step()
            if done in marks:
                memory[2 * done] = resident(place.pid)
        up, down = (total / sizes.operations for total in wire.take())
    shown = ", ".join(f"{size / 1e6:.1f} after {done}" for done, size in memory.items())
    print(
        f"\nendurance  {sizes.operations} operations: {up:.0f} bytes up and {down:.0f} down for each; memory, MB: {shown}"
    )
    return {"case": "endurance", "bytes up": up, "bytes down": down, "memory": memory}


CASES: Final[dict[str, Callable[[Place, Sizes], dict[str, Any]]]] = {
    "clients": many_clients,
    "turns": turns,
    "rl": reinforcement,
    "healthz": health,
    "endurance": endurance,
}


def stepping(backend: Any, data: Sequence[Datum]) -> Callable[[], object]:
    """Return a step: both operations are sent before either is waited for."""

    def step() -> object:
        sent = backend.forward_backward(data, "cross_entropy")
        done = backend.optim_step(_PARAMS)
        return sent.result(), done.result()

    return step


def _table(case: str, words: str, found: Mapping[str, Sequence[Measured]], baseline: str) -> dict[str, Any]:
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
