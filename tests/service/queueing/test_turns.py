"""Owners take turns; long works give way between their slices; the order within a queue is kept."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from served.endless import EndlessWork
from servers import Direct

from pullback.backends import TorchBackend
from pullback.service.durability.answers import Answer, Failure
from pullback.service.durability.journal import Journal
from pullback.service.limits import Limits
from pullback.service.queueing.sequencer import Sequencer


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Journal:
    return Journal(tmp_path_factory.mktemp("turns") / "journal.sqlite")


class Held:
    """A sequencer whose worker waits until it is let go; works note their turns."""

    def __init__(self, journal: Journal) -> None:
        self.sequencer, self.prefix = Sequencer(journal, Limits(queue=4096)), uuid.uuid4().hex
        self.turns: list[tuple[str, str, int]] = []  # owner, operation, slice
        self.requests: dict[str, tuple[str, str]] = {}
        self._gate = threading.Event()
        self.sequencer.run(lambda: self._gate.wait(120))

    def add(self, owner: str, queue: str, number: int | None, slices: int, *, ordered: bool = True) -> str:
        """Submit an operation of so many slices; 0: one that is no generator."""
        name = f"{queue}/{number}"

        def sliced() -> Generator[None, None, Answer]:
            for i in range(slices):
                self.turns.append((owner, name, i))
                if i < slices - 1:
                    yield
            return {"done": name}

        def whole() -> Answer:
            self.turns.append((owner, name, 0))
            return {"done": name}

        line = f"{self.prefix}:{queue}"
        self.sequencer.open(line)
        work: Callable[[], Any] = sliced if slices else whole
        request = self.sequencer.submit(owner, line, number, b"", "kind", work, ordered=ordered)
        self.requests[name] = (owner, request)
        return request

    def go(self) -> dict[str, Any]:
        """Let the worker go; return all answers."""
        self._gate.set()
        found = {n: self.sequencer.result(*r).result(timeout=120) for n, r in self.requests.items()}
        self.sequencer.close()
        return found


Given = list[tuple[int, int, int, bool]]  # owner, queue, slices, ordered
OPERATIONS = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 1), st.integers(0, 4), st.booleans()), min_size=1, max_size=12
)


def submitted(held: Held, operations: Given) -> None:
    numbers: dict[str, int] = {}
    for owner, queue, slices, ordered in operations:
        line = f"{owner}-{queue}" if ordered else f"{owner}-{queue}-free"
        numbers[line] = numbers.get(line, 0) + 1
        held.add(str(owner), line, numbers[line], slices, ordered=ordered)


def round_robin(operations: Given) -> list[str]:
    """Whose turns follow each other where all owners wait from the beginning."""
    left: dict[str, int] = {}
    for owner, _, slices, _ in operations:
        left[str(owner)] = left.get(str(owner), 0) + max(slices, 1)
    rounds = range(max(left.values()))
    return [owner for n in rounds for owner, turns in left.items() if turns > n]


@given(operations=OPERATIONS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_owners_take_turns(journal: Journal, operations: Given) -> None:
    """Every owner has one slice a round; each slice runs once, and a queue's operations follow each other whole."""
    held = Held(journal)
    submitted(held, operations)
    assert held.go() == {name: {"done": name} for name in held.requests}
    assert [owner for owner, _, _ in held.turns] == round_robin(operations)
    by_queue: dict[str, list[tuple[int, int]]] = {}
    for _, name, part in held.turns:
        queue, number = name.split("/")
        by_queue.setdefault(queue, []).append((int(number), part))
    for queue, parts in by_queue.items():
        assert len(parts) == len(set(parts))
        if not queue.endswith("free"):
            assert parts == sorted(parts)


def of_operation(turns: list[tuple[str, str, int]]) -> Iterator[str]:
    return (name for _, name, _ in turns)


def test_a_light_operation_behind_heavy_ones(journal: Journal) -> None:
    """What arrives while the first of twenty heavy operations runs comes second; of the same owner it would come last."""
    for owner, place in (("other", 1), ("greedy", 20)):
        held, begun, gate = Held(journal), threading.Event(), threading.Event()

        def first(begun: threading.Event = begun, gate: threading.Event = gate) -> Answer:
            begun.set()
            gate.wait(120)
            return {}

        line = f"{held.prefix}:heavy"
        held.sequencer.open(line)
        held.sequencer.submit("greedy", line, 1, b"", "kind", first)
        for number in range(2, 21):
            held.add("greedy", "heavy", number, 0)
        held._gate.set()
        assert begun.wait(120)
        held.add(owner, "light" if owner == "other" else "heavy", 1 if owner == "other" else 21, 0)
        gate.set()
        held.go()
        names = ["first", *of_operation(held.turns)]
        assert [i for i, name in enumerate(names) if name in ("light/1", "heavy/21")] == [place]


def test_a_step_of_another_key_is_next(direct: Direct, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the service: behind twenty gradients of one key, another key's step is the second operation that runs."""
    ran: list[str] = []
    for verb in ("forward_backward", "optim_step"):
        monkeypatch.setattr(TorchBackend, verb, noting(getattr(TorchBackend, verb), ran))
    direct.journal.add_session("theirs", "you", None)
    body = {"session_id": "theirs", "model_seq_id": 0, "base_model": "tiny", "lora_config": {"rank": 2}}
    made = direct.operations.create_model("you", json.dumps(body).encode(), body)
    answer: Any = direct.sequencer.result("you", made).result(timeout=120)
    gate = threading.Event()
    direct.sequencer.run(lambda: gate.wait(120))
    heavy = [direct.gradient(number) for number in range(1, 21)]
    step = {"model_id": answer["model_id"], "seq_id": 1, "adam_params": {"learning_rate": 1e-2}}
    light = direct.operations.training.optim_step("you", json.dumps(step).encode(), step)
    gate.set()
    assert not isinstance(direct.sequencer.result("you", light).result(timeout=120), Failure)
    for request in heavy:
        assert not isinstance(direct.read(request), Failure)
    assert ran == ["forward_backward", "optim_step", *["forward_backward"] * 19]


def noting(operation: Any, ran: list[str]) -> Any:
    """The operation, which says that it runs."""

    def noted(*given: Any, **named: Any) -> Any:
        ran.append(operation.__name__)
        return operation(*given, **named)

    return noted


def test_operations_without_an_order_are_in_progress_together(journal: Journal) -> None:
    """Slices of unordered operations of one owner alternate; ordered ones of one queue do not."""
    held = Held(journal)
    for number in (1, 2):
        held.add("me", "free", number, 3, ordered=False)
    held.go()
    assert list(of_operation(held.turns)) == ["free/1", "free/2"] * 3
    held = Held(journal)
    for number in (1, 2):
        held.add("me", "queue", number, 3)
    held.go()
    assert list(of_operation(held.turns)) == ["queue/1"] * 3 + ["queue/2"] * 3


def test_without_a_number_the_order_is_that_of_arrival(journal: Journal) -> None:
    """An ordered operation that has no number waits for all of its queue whose turn had come."""
    held = Held(journal)
    for number in (1, None, 2):
        held.add("me", "queue", number, 2)
    held.add("me", "other", 1, 1)
    held.go()
    ran = list(of_operation(held.turns))
    assert [name for name in ran if name.startswith("queue")] == ["queue/1"] * 2 + ["queue/None"] * 2 + ["queue/2"] * 2


@pytest.mark.parametrize("error", [ValueError("no such thing"), RuntimeError("broken"), SystemExit(1), GeneratorExit()])
@pytest.mark.parametrize("pauses", [0, 1])
def test_an_error_ends_its_operation_alone(journal: Journal, error: BaseException, pauses: int) -> None:
    """A work that fails, at once or in a later slice and by whatever error, has had its turn; the next of its queue runs."""
    held = Held(journal)

    def failing() -> Generator[None, None, Answer]:
        for _ in range(pauses):
            yield
        raise error

    held.sequencer.open(f"{held.prefix}:queue")
    held.requests["bad"] = ("me", held.sequencer.submit("me", f"{held.prefix}:queue", 1, b"", "kind", failing))
    held.add("me", "queue", 2, 2)
    held.add("me", "other", 1, 2)
    answers = held.go()
    user = isinstance(error, ValueError)
    expected = Failure(str(error), "user") if user else Failure(f"{type(error).__name__}: {error}", "server")
    assert answers.pop("bad") == expected
    assert answers == {name: {"done": name} for name in ("queue/2", "other/1")}


def test_the_end_of_a_queue_stops_what_is_in_slices(journal: Journal) -> None:
    """A work in slices stops at its next pause and cleans up; what waits is answered before the worker is free."""
    held, begun, gate = Held(journal), threading.Event(), threading.Event()
    events: list[str] = []

    def long() -> Generator[None, None, Answer]:
        try:
            begun.set()
            gate.wait(120)
            yield
            events.append("went on")
        finally:
            events.append("cleaned up")
        return {}

    line = f"{held.prefix}:queue"
    held.sequencer.open(line)
    held.requests["long"] = ("me", held.sequencer.submit("me", line, 1, b"", "kind", long))
    for number in (2, 3, 9):  # 4 to 8 do not come
        held.add("me", "queue", number, 2)
    held.add("me", "queue", 20, 2, ordered=False)
    held._gate.set()
    assert begun.wait(120)
    held.sequencer.end(line, "the session ended")
    why = Failure("the session ended", "user")
    waiting = [held.sequencer.result(*held.requests[f"queue/{n}"]) for n in (2, 3, 9, 20)]
    assert [future.done() and future.result() for future in waiting] == [why] * 4
    assert not held.sequencer.result(*held.requests["long"]).done()
    gate.set()
    assert held.go()["long"] == why
    assert (events, held.turns) == (["cleaned up"], [])


def test_closing_stops_what_is_in_slices(tmp_path: Path) -> None:
    """A work that pauses when the server stops is cleaned up, and not run to its end."""
    sequencer, endless = Sequencer(Journal(tmp_path / "journal.sqlite")), EndlessWork()
    sequencer.open("queue")
    sequencer.submit("me", "queue", 1, b"", "kind", endless)
    assert endless.begun.wait(120)
    sequencer.close()
    assert endless.stopped == 1
