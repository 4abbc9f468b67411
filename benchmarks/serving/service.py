"""Many clients of one service: steps a second, waiting times, turns between keys, an RL loop, bytes and memory."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Final

from pullback import Datum
from pullback.cli.arguments.models import load_named
from pullback.service import Base

from ..timing import environment
from .load import Measured, at_once, probing, resident, timed
from .place import KEYS, STEP, Place, Sizes, table
from .sampling_cases import adapters, reinforcement
from .services import own_service, relay

__all__ = ["KEYS", "Place", "Sizes", "run"]

_MARKS: Final = (0.1, 0.25, 0.5, 0.75, 1.0)  # of the long run: where memory is read


def run(arguments: Any) -> None:
    """Start a service, measure, print."""
    os.environ.setdefault("TINKER_TELEMETRY", "0")  # it would be counted
    sizes = Sizes(
        **{name: getattr(arguments, name) for name in Sizes.__dataclass_fields__ if name != "clients"},
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
    return table("clients", words, {name: found[name] for name in works}, "1 client")


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
            first.optim_step(STEP).result()
    words = f"{sizes.behind} calls of {sizes.heavy} x {sizes.heavy_length} tokens before a step of another key"
    rows = table("turns", words, found, "a heavy call alone")
    return {**rows, "heavy calls that had ended before": ended}


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
    return table("healthz", "one request after another", found, "idle")


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
    "adapters": adapters,
    "healthz": health,
    "endurance": endurance,
}


def stepping(backend: Any, data: Sequence[Datum]) -> Callable[[], object]:
    """Return a step: both operations are sent before either is waited for."""

    def step() -> object:
        sent = backend.forward_backward(data, "cross_entropy")
        done = backend.optim_step(STEP)
        return sent.result(), done.result()

    return step
