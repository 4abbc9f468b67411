"""Listings of thousands of models cost a page, whichever page; totals are right; what is old or finished leaves the journal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from served.journal_rows import rows_of, written
from servers import Direct, tiny_models

from pullback.backends.native.models.lora import LoraChoice
from pullback.errors import CheckpointError, NotFoundError
from pullback.service.durability import journal as journal_module
from pullback.service.durability.journal import Journal
from pullback.service.durability.retention import ROW_SECONDS, prune
from pullback.service.served.listings import Listings
from pullback.service.served.logical_names import LogicalNames

MANY, FEW = 5000, 50
DAY = 24 * 3600.0


def filled(folder: Path, count: int) -> tuple[Journal, Listings]:
    """Return a journal of so many sessions, each with a model that has two checkpoints, and its listings."""
    models = tiny_models(folder)
    journal = Journal(folder / "journal.sqlite")
    journal.database.write(*[written(*row) for i in range(count) for row in rows_of(i)])
    journal.close()
    journal = Journal(folder / "journal.sqlite")  # which counts them
    return journal, Listings(models, journal)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Journal, Listings]]:
    journal, lists = filled(tmp_path_factory.mktemp("many"), MANY)
    yield journal, lists
    journal.close()


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Journal, Listings]]:
    journal, lists = filled(tmp_path_factory.mktemp("few"), FEW)
    yield journal, lists
    journal.close()


def steps(journal: Journal, work: Callable[[], Any]) -> int:
    """Return how many steps SQLite's machine makes for a piece of work."""
    count = 0

    def step() -> int:
        nonlocal count
        count += 1
        return 0

    journal.database.watch(step, 1)
    try:
        work()
    finally:
        journal.database.watch(None, 0)
    return count


PAGES: dict[str, Callable[[Journal, Listings], Any]] = {
    "runs": lambda journal, lists: lists.runs("me", {"limit": "1"}),
    "run": lambda journal, lists: lists.run("me", "sess-7:train:0"),
    "checkpoints": lambda journal, lists: lists.checkpoints("me", {"limit": "1"}),
    "checkpoints of one model": lambda journal, lists: lists.checkpoints("me", {}, "sess-7:train:0"),
    "sessions": lambda journal, lists: lists.sessions("me", {"limit": "1"}),
    "session": lambda journal, lists: lists.session("me", "sess-7"),
    "resolve": lambda journal, lists: LogicalNames(journal).resolve("me", "sess-7:train:0", "step-7"),
    "last checkpoint": lambda journal, lists: journal.last_checkpoint("sess-7:train:0"),
}


@pytest.mark.parametrize("page", PAGES)
def test_a_page_costs_the_same_among_thousands(
    many: tuple[Journal, Listings], few: tuple[Journal, Listings], page: str
) -> None:
    """Counted in steps of SQLite's machine: 5,000 models are no more than 50; reading all of them, which was so, is."""
    assert 0 < steps(many[0], lambda: PAGES[page](*many)) <= 1.2 * steps(few[0], lambda: PAGES[page](*few))
    everything = steps(many[0], lambda: many[0].models("me"))
    assert everything > 10 * steps(few[0], lambda: few[0].models("me"))


def test_a_name_that_is_not_there_is_refused_in_few_words(many: tuple[Journal, Listings]) -> None:
    """The message names some of the thousands that are there."""
    with pytest.raises(CheckpointError, match="and more, of which list_checkpoints tells") as refused:
        LogicalNames(many[0]).resolve("me", "sess-7:train:0", "none")
    assert len(str(refused.value)) < 1000


@given(limit=st.integers(-3, 80), offset=st.integers(-3, 80))
@settings(max_examples=30)
def test_pages_are_slices_of_the_whole(few: tuple[Journal, Listings], limit: int, offset: int) -> None:
    """Newest first, and the total does not depend on the page."""
    journal, lists = few
    query = {"limit": str(limit), "offset": str(offset)}
    start, end = max(0, offset), max(0, offset) + max(0, limit)
    whole = [row["id"] for row in journal.models("me")]
    assert whole == [f"sess-{i}:train:0" for i in reversed(range(FEW))]
    given = lists.runs("me", query)
    assert [run["training_run_id"] for run in given["training_runs"]] == whole[start:end]
    assert given["cursor"]["total_count"] == FEW
    assert lists.sessions("me", query)["sessions"] == [model.split(":")[0] for model in whole[start:end]]
    checkpoints = lists.checkpoints("me", query)
    assert checkpoints["checkpoints"] == lists.checkpoints("me", {"limit": "1000"})["checkpoints"][start:end]
    assert checkpoints["cursor"]["total_count"] == 2 * FEW
    assert lists.runs("another", query)["cursor"]["total_count"] == 0


@pytest.mark.parametrize("given", [str(10**30), "-1"])
def test_a_page_of_any_size_is_answered(few: tuple[Journal, Listings], given: str) -> None:
    """Numbers that SQLite does not have are none that a client is punished for."""
    assert few[1].runs("me", {"limit": given, "offset": "0"})["cursor"]["total_count"] == FEW
    assert few[1].runs("me", {"limit": "1", "offset": given})["cursor"]["total_count"] == FEW


def counted(journal: Journal, table: str) -> int:
    """Return how many rows there are by SQLite's own count."""
    return int(journal.database.select(f"SELECT count(*) FROM {table}")[0][0])


@given(
    acts=st.lists(
        st.tuples(st.sampled_from(["add", "again", "drop", "reopen"]), st.integers(0, 4)), min_size=5, max_size=8
    )
)
@settings(max_examples=5)
def test_totals_are_right_whatever_happens(
    tmp_path_factory: pytest.TempPathFactory, acts: list[tuple[str, int]]
) -> None:
    """Added, replaced, deleted, opened again: as SQLite counts."""
    path = tmp_path_factory.mktemp("totals") / "journal.sqlite"
    journal = Journal(path)
    for act, which in acts:
        uri = f"tinker://m{which}/weights/one"
        if act in ("add", "again"):
            journal.add_checkpoint(uri, f"m{which}", "me", 1, 1, None)
        elif act == "drop":
            journal.drop_checkpoint(uri)
        else:
            journal.close()
            journal = Journal(path)
        assert journal.total("checkpoints", "me") == counted(journal, "checkpoints")
    journal.close()


def old_session(journal: Journal, session: str, age: float, *, ended: bool, checkpoint: bool) -> None:
    """Note a session with a model and an operation, all of them so old."""
    moment, model = time.time() - age, f"{session}:train:0"
    put = journal.database.put
    put("sessions", session, "me", "null", moment, moment if ended else None)
    put("models", model, session, "me", '{"rank": 2}', "null", None, moment)
    put("samplers", f"{session}:sample:0", "me", None, 1, moment, None, None)
    for queue, number in ((f"{session}:models", 0), (model, 1), (f"{session}:sample:0:asample", 0)):
        request = f"req-{queue}"
        journal.accept(request, "me", queue, number, "digest", "kind")
        journal.finish(request, {"type": "kind"})
    if checkpoint:
        journal.add_checkpoint(f"tinker://{model}/weights/one", model, "me", 1, 1, None)
    journal.database.change("UPDATE operations SET created = ? WHERE line >= ? RETURNING 1", moment, session)


def left(journal: Journal) -> dict[str, int]:
    return {table: counted(journal, table) for table in ("sessions", "models", "samplers", "operations")}


ALL = {"sessions": 1, "models": 1, "samplers": 1, "operations": 3}
NONE = dict.fromkeys(ALL, 0)


@pytest.mark.parametrize(
    ("age", "ended", "checkpoint", "alive", "expected"),
    [
        (0.9 * DAY, True, False, False, ALL),
        (1.1 * DAY, True, False, False, NONE),
        (1.1 * DAY, True, False, True, ALL),
        (1.1 * DAY, True, True, False, ALL),
        (0.9 * ROW_SECONDS, False, False, False, ALL),
        (1.1 * ROW_SECONDS, False, False, False, NONE),
        (1.1 * ROW_SECONDS, False, False, True, {**ALL, "operations": 1}),  # no number of a creation is used twice
        (1.1 * ROW_SECONDS, False, True, False, {**ALL, "operations": 1}),
    ],
)
def test_what_is_old_or_finished_leaves(
    tmp_path: Path, age: float, ended: bool, checkpoint: bool, alive: bool, expected: dict[str, int]
) -> None:
    """A day after it was finished, a week after it was made and left; never what a checkpoint or a living session needs."""
    journal = Journal(tmp_path / "journal.sqlite")
    old_session(journal, "sess-old", age, ended=ended, checkpoint=checkpoint)
    before = sum(left(journal).values())
    deleted = prune(journal, time.time(), {"sess-old"} if alive else set())
    assert left(journal) == expected
    assert deleted == before - sum(expected.values())
    assert journal.total("models", "me") == expected["models"]
    journal.close()


def test_an_operation_that_has_not_ended_keeps_its_model(tmp_path: Path) -> None:
    """Until it has."""
    journal = Journal(tmp_path / "journal.sqlite")
    old_session(journal, "sess-old", 30 * DAY, ended=True, checkpoint=False)
    journal.accept("req-open", "me", "sess-old:train:0", 2, "digest", "kind")
    prune(journal, time.time(), ())
    assert left(journal)["models"] == 1
    journal.finish("req-open", {"type": "kind"})
    prune(journal, time.time() + 30 * DAY, ())
    assert left(journal) == NONE
    journal.close()


def test_the_journal_does_not_grow_for_ever(tmp_path: Path) -> None:
    """Session after session, each of them old by now: its pages are used again."""
    journal, sizes = Journal(tmp_path / "journal.sqlite"), []
    for i in range(20):
        old_session(journal, f"sess-{i:03}", 2 * DAY, ended=True, checkpoint=False)
        prune(journal, time.time(), ())
        sizes.append(int(journal.database.select("PRAGMA page_count")[0][0]))
    assert sizes[-1] == sizes[4]
    journal.close()


def test_answers_go_and_their_checksums_stay_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a day an answer is thrown away; that it was given stays known."""
    monkeypatch.setattr(journal_module, "ROWS_AT_ONCE", 3)
    journal = Journal(tmp_path / "journal.sqlite")
    for i in range(8):
        journal.accept(f"req-{i}", "me", "queue", i, "digest", "kind")
        journal.finish(f"req-{i}", {"number": i})
    journal.forget_answers(time.time() - DAY)
    operation = journal.operation("req-7")
    assert operation is not None
    assert operation.answer == {"number": 7}
    journal.forget_answers(time.time() + 1)
    for i in range(8):
        operation = journal.operation(f"req-{i}")
        assert operation is not None
        assert operation.answer is None
        assert operation.expired
    journal.close()


def test_a_finished_session_is_noted(direct: Direct) -> None:
    """So that its rows can leave, a day later."""
    direct.operations.finish("sess")
    row = direct.journal.session("sess")
    assert row is not None
    assert row["ended"] is not None


def test_another_owners_session_is_not_found(many: tuple[Journal, Listings]) -> None:
    """Nor its models."""
    with pytest.raises(NotFoundError, match="no session"):
        many[1].session("another", "sess-7")
    with pytest.raises(NotFoundError, match="no model"):
        many[1].run("another", "sess-7:train:0")
    assert LoraChoice.from_json(many[0].models("me", 1)[0]["lora"]).rank == 2
