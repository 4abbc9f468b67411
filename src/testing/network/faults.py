"""A proxy that injects network faults into the requests of a client, by a schedule.

Put it between a client and a service, and compare the trained weights with those of a run without it:

    with misbehaving(url, {("optim_step", 2): Fault("drop_response")}) as proxy:
        train(proxy.url)        # the answer to the second optim_step is lost

A fault belongs to the n-th request of a route, so the order of requests to different routes does not matter.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, final, get_args
from urllib.parse import urlsplit

from .raw_http import Request, error_answer, read_request, send

__all__ = ["FAULT_KINDS", "Exchange", "Fault", "FaultKind", "FaultyProxy", "Schedule", "misbehaving"]

FaultKind: TypeAlias = Literal[
    "drop_request",
    "cut_request",
    "error",
    "delay",
    "duplicate",
    "replay",
    "drop_response",
    "cut_response",
    "stall",
    "slow",
    "error_after",
]
FAULT_KINDS: Final[tuple[FaultKind, ...]] = get_args(FaultKind)
Schedule: TypeAlias = Mapping[tuple[str, int], "Fault"]

_PIECES: Final = 8
_START_SECONDS: Final = 10.0


@final
@dataclass(frozen=True)
class Fault:
    """What happens to one request.

    Before it reaches the service: ``drop_request`` closes the connection, ``cut_request`` delivers half of the request,
    ``error`` answers 503 in its place, ``delay`` lets other requests overtake it. On the way: ``duplicate`` delivers it
    twice at once, ``replay`` delivers it again later. After the service has answered: ``drop_response`` closes the
    connection, ``cut_response`` delivers half of the answer, ``stall`` delivers half and closes the connection later,
    ``slow`` delivers it piece by piece, ``error_after`` answers 502 in its place.

    Args:
        kind: one of these.
        seconds: how long ``delay``, ``replay``, ``stall`` and ``slow`` take.
    """

    kind: FaultKind
    seconds: float = 0.05

    def __post_init__(self) -> None:
        if self.kind not in FAULT_KINDS:
            raise ValueError(f"a fault must be one of {', '.join(FAULT_KINDS)}; got {self.kind!r}")


@final
@dataclass(frozen=True)
class Exchange:
    """One request, and what the service answered, whether or not the answer reached the client.

    Attributes:
        route: the path without the common prefix.
        number: 1 for the first request of that route, 2 for the second, and so on.
        fault: what happened to it; None if nothing did.
        request: the body.
        status, response: of the answer; 0 and empty if the service was not asked or could not be reached.
    """

    route: str
    number: int
    fault: Fault | None
    request: bytes
    status: int
    response: bytes


@final
class FaultyProxy:
    """An HTTP proxy on 127.0.0.1, made by `misbehaving`.

    Args:
        upstream: base URL of the service; set it again when the service moves.
        schedule: (route, n) -> the fault of the n-th request of that route.

    Attributes:
        url: the proxy's own base URL.
        exchanges: the requests so far, in the order in which they ended.
    """

    def __init__(self, upstream: str, schedule: Schedule) -> None:
        self.upstream, self.url = upstream, ""
        self.exchanges: list[Exchange] = []
        self._schedule = dict(schedule)
        self._seen: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()

    def plan(self, route: str, fault: Fault) -> None:
        """Schedule a fault for the next request of a route that has none yet."""
        number = self._seen[route] + 1
        while (route, number) in self._schedule:
            number += 1
        self._schedule[route, number] = fault

    async def run(self, ready: Callable[[], None], stop: asyncio.Event) -> None:
        """Serve until ``stop`` is set."""
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        ready()
        await stop.wait()
        server.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Handle one request, then close the connection."""
        try:
            request = await read_request(reader)
            self._seen[request.route] += 1
            number = self._seen[request.route]
            fault = self._schedule.get((request.route, number))
            answer = await self._answer(request, fault, writer)
            body = answer.partition(b"\r\n\r\n")[2]
            status = int(answer.split(b" ", 2)[1]) if answer else 0
            self.exchanges.append(Exchange(request.route, number, fault, request.body, status, body))
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            writer.transport.abort()  # one side has closed its connection, so close the other
        except asyncio.CancelledError:
            writer.transport.abort()
        finally:
            writer.close()

    async def _answer(self, request: Request, fault: Fault | None, writer: asyncio.StreamWriter) -> bytes:
        """Inject the fault of a request; return the answer of the service."""
        kind, seconds = ("none", 0.0) if fault is None else (fault.kind, fault.seconds)
        if kind in ("drop_request", "cut_request"):
            if kind == "cut_request":
                await self._send_half(request)
            writer.transport.abort()
            return b""
        if kind == "error":
            await send(writer, error_answer(503))
            return b""
        if kind == "delay":
            await asyncio.sleep(seconds)
        if kind == "duplicate":
            _, answer = await asyncio.gather(self._forward(request), self._forward(request))
        else:
            answer = await self._forward(request)
        if kind == "replay":
            task = asyncio.create_task(self._send_later(request, seconds))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        await _ENDINGS.get(kind, _whole)(writer, answer, seconds)
        return answer

    async def _forward(self, request: Request) -> bytes:
        """Send a request to the service on a new connection; return the whole answer."""
        reader, writer = await self._connect()
        try:
            writer.write(request.head + request.body)
            await writer.drain()
            return await reader.read()
        finally:
            writer.close()

    async def _send_half(self, request: Request) -> None:
        whole = request.head + request.body
        _, writer = await self._connect()
        writer.write(whole[: len(request.head) + len(request.body) // 2])
        await writer.drain()
        writer.close()

    async def _send_later(self, request: Request, seconds: float) -> None:
        await asyncio.sleep(seconds)
        with contextlib.suppress(OSError):
            await self._forward(request)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        address = urlsplit(self.upstream)
        return await asyncio.open_connection(address.hostname, address.port)


@contextmanager
def misbehaving(upstream: str, schedule: Schedule | None = None) -> Iterator[FaultyProxy]:
    """Run a `FaultyProxy` in a thread of its own.

    Args:
        upstream: base URL of the service, ``http://host:port``.
        schedule: (route, n) -> the fault of the n-th request of that route; all others pass.
    """
    proxy, stop = FaultyProxy(upstream, schedule or {}), asyncio.Event()
    ready, loop = threading.Event(), asyncio.new_event_loop()

    def serve() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(proxy.run(ready.set, stop))

    thread = threading.Thread(target=serve, name="faulty-proxy", daemon=True)
    thread.start()
    if not ready.wait(_START_SECONDS):
        raise RuntimeError("the proxy did not start")
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()


async def _whole(writer: asyncio.StreamWriter, answer: bytes, _: float) -> None:
    await send(writer, answer)


async def _nothing(writer: asyncio.StreamWriter, _: bytes, __: float) -> None:
    writer.transport.abort()


async def _failed(writer: asyncio.StreamWriter, _: bytes, __: float) -> None:
    await send(writer, error_answer(502))


async def _cut(writer: asyncio.StreamWriter, answer: bytes, seconds: float) -> None:
    head, gap, body = answer.partition(b"\r\n\r\n")
    await send(writer, head + gap + body[: len(body) // 2])
    await asyncio.sleep(0.001)  # so that the half is sent before the connection closes
    writer.transport.abort()


async def _stall(writer: asyncio.StreamWriter, answer: bytes, seconds: float) -> None:
    head, gap, body = answer.partition(b"\r\n\r\n")
    await send(writer, head + gap + body[: len(body) // 2])
    await asyncio.sleep(seconds)
    writer.transport.abort()


async def _slow(writer: asyncio.StreamWriter, answer: bytes, seconds: float) -> None:
    size = len(answer) // _PIECES + 1
    for start in range(0, len(answer), size):
        await send(writer, answer[start : start + size])
        await asyncio.sleep(seconds / _PIECES)


_Ending: TypeAlias = Callable[[asyncio.StreamWriter, bytes, float], Awaitable[None]]
_ENDINGS: Final[Mapping[str, _Ending]] = {
    "drop_response": _nothing,
    "error_after": _failed,
    "cut_response": _cut,
    "stall": _stall,
    "slow": _slow,
}
