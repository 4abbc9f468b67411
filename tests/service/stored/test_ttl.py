"""A checkpoint's time to live: kept, shown, changed, ended; whatever the journal has been through."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import tinker
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import KEY, MODEL, SDK_WARNINGS, Direct, rest

from pullback.errors import CheckpointError, ConfigError, NotFoundError
from pullback.service.durability.answers import Failure
from pullback.service.durability.descriptions import expiry, require_ttl
from pullback.service.served.listings import Listings
from pullback.service.stored.maintenance import Maintenance

pytestmark = SDK_WARNINGS
HOUR, YEARS = 3600, 10 * 365 * 24 * 3600
ONE = f"tinker://{MODEL}/weights/one"


@given(seconds=st.one_of(st.integers(-10, 2 * YEARS), st.sampled_from([HOUR - 1, HOUR, YEARS, YEARS + 1])))
@settings(max_examples=50)
def test_from_an_hour_to_ten_years(seconds: int) -> None:
    """As the protocol has it, on both sides of each limit."""
    if HOUR <= seconds <= YEARS:
        assert expiry(seconds, 1000.0) == 1000.0 + seconds
    else:
        with pytest.raises(ConfigError, match=r"3600 \(an hour\)"):
            require_ttl(seconds)


@pytest.mark.parametrize("seconds", [True, 3600.0, "3600", [3600], float("nan")])
def test_what_is_no_whole_number_is_refused(seconds: Any) -> None:
    """Null is one that never ends."""
    with pytest.raises(ConfigError, match="whole number"):
        require_ttl(seconds)
    assert expiry(None, 1000.0) is None


def saved(direct: Direct, **more: Any) -> tuple[Listings, Any]:
    """A checkpoint of a time to live; the listings, and its entry there."""
    direct.read(direct.gradient(1))
    direct.read(direct.call("optim_step", 2))
    direct.read(direct.call("save_weights", 3, path="one", **more))
    lists = Listings(direct.models, direct.journal)
    return lists, lists.checkpoints("me", {})["checkpoints"][0]


def loaded(direct: Direct, number: int) -> Any:
    """The answer of making a model from the checkpoint."""
    given = {"session_id": "sess", "model_seq_id": number, "path": ONE, "optimizer": True}
    return direct.read(direct.operations.load_weights("me", b"", given))


@pytest.mark.parametrize("restarted", [False, True])
def test_it_is_loaded_until_then_and_not_after(direct: Direct, restarted: bool) -> None:
    """In words before it is deleted, and after; then it is in no listing, and no message names it."""
    began = time.time()
    lists, shown = saved(direct, ttl_seconds=HOUR)
    ends = datetime.fromisoformat(shown["expires_at"]).timestamp()
    assert began + HOUR <= ends <= time.time() + HOUR
    if restarted:
        direct = direct.restart()
        lists = Listings(direct.models, direct.journal)
        assert lists.checkpoints("me", {})["checkpoints"][0] == shown
    direct.models.checkpoints.clock = lambda: ends - 1
    assert loaded(direct, 1)["type"] == "load_weights"
    direct.models.checkpoints.clock = lambda: ends + 1e-3  # the listing shows microseconds
    late = loaded(direct, 2)
    assert isinstance(late, Failure)
    assert f"the time to live of {ONE} ended at {shown['expires_at'][:19]}" in late.text
    with pytest.raises(CheckpointError, match="time to live"):
        lists.weights_info("me", ONE)
    assert lists.run("me", MODEL)["last_checkpoint"] is None
    assert lists.checkpoints("me", {}) == {
        "checkpoints": [],
        "cursor": {"offset": 0, "limit": 20, "total_count": 0},
    }
    assert not direct.models.checkpoints.folder(MODEL, "weights").joinpath("one").exists()
    assert direct.journal.last_checkpoint(MODEL) is None
    gone = loaded(direct, 3)
    assert "its time to live has passed" in gone.text
    direct.sequencer.close()


def test_what_nobody_looks_at_ends_too(direct: Direct) -> None:
    """From time to time the server deletes what is due, and nothing else."""
    direct.read(direct.gradient(1))
    direct.read(direct.call("save_weights", 2, path="one", ttl_seconds=HOUR))
    direct.read(direct.call("save_for_sampler", 3, path="two", ttl_seconds=2 * HOUR))
    direct.read(direct.call("save_weights", 4, path="three"))
    maintenance = Maintenance(direct.models.checkpoints, direct.journal, direct.operations.sessions)
    maintenance.work()
    assert direct.journal.total("checkpoints", "me") == 3
    moment = time.time()
    for hours, expected in ((1.1, {"two", "three"}), (2.1, {"three"})):
        direct.models.checkpoints.clock = lambda hours=hours: moment + hours * HOUR
        maintenance.work()
        assert {row["name"] for row in direct.journal.checkpoints("me")} == expected
        assert {path.name for path in direct.models.checkpoints.root.glob("*/*weights/*")} == expected


def test_a_time_to_live_that_is_none_fails_before_any_work(direct: Direct) -> None:
    """The user's fault; the number has had its turn, and there is no checkpoint."""
    direct.read(direct.gradient(1))
    answer = direct.read(direct.call("save_weights", 2, path="one", ttl_seconds=5))
    assert isinstance(answer, Failure)
    assert answer.category == "user"
    assert "3600 (an hour)" in answer.text
    assert not list(direct.models.checkpoints.all())
    assert direct.read(direct.call("optim_step", 3))["metrics"]


def test_it_is_changed_and_taken_away(direct: Direct) -> None:
    """In the journal and in the folder, from which a lost journal is made anew."""
    lists, shown = saved(direct, ttl_seconds=HOUR)
    with pytest.raises(ConfigError):
        lists.set_ttl("me", MODEL, "weights/one", 5)
    with pytest.raises(NotFoundError):
        lists.set_ttl("another", MODEL, "weights/one", HOUR)
    assert lists.checkpoints("me", {})["checkpoints"] == [shown]
    lists.set_ttl("me", MODEL, "weights/one", 2 * HOUR)
    later = lists.checkpoints("me", {})["checkpoints"][0]["expires_at"]
    assert (
        datetime.fromisoformat(later).timestamp() > datetime.fromisoformat(shown["expires_at"]).timestamp() + HOUR - 60
    )
    lists.set_ttl("me", MODEL, "weights/one", None)
    direct.journal.close()
    for path in direct.models.checkpoints.root.glob("journal.sqlite*"):
        path.unlink()
    again = direct.restart()
    (row,) = again.journal.checkpoints("me")
    assert row["expires"] is None
    again.models.checkpoints.clock = lambda: time.time() + 2 * YEARS
    assert again.models.checkpoints.locate(ONE)
    again.sequencer.close()


def test_an_overwritten_checkpoint_has_the_new_time(direct: Direct) -> None:
    """Not that of the one whose name it took."""
    lists, _ = saved(direct, ttl_seconds=HOUR)
    direct.read(direct.call("save_weights", 4, path="one", overwrite=True))
    assert lists.checkpoints("me", {})["checkpoints"][0]["expires_at"] is None
    direct.models.checkpoints.clock = lambda: time.time() + 2 * HOUR
    assert loaded(direct, 1)["type"] == "load_weights"


def test_by_the_sdk(url: str, tmp_path: Path) -> None:
    """Saved with one, changed and taken away by the official client; refused in words by the routes."""
    with tinker.ServiceClient(base_url=url, api_key=KEY) as service:
        client = service.create_lora_training_client("tiny", rank=2).result()
        path = client.save_state("lives", ttl_seconds=HOUR).result().path
        sampler = client.save_weights_for_sampler("samples", ttl_seconds=2 * HOUR).result().path
        asked = tinker.RestClient(base_url=url, api_key=KEY)

        def ends() -> dict[str, Any]:
            found = asked.list_checkpoints(client.model_id).result().checkpoints
            return {checkpoint.tinker_path: checkpoint.expires_at for checkpoint in found}

        assert None not in ends().values()
        asked.set_checkpoint_ttl_from_tinker_path(path, None).result()
        assert ends()[path] is None
        asked.set_checkpoint_ttl_from_tinker_path(path, 5 * HOUR).result()
        assert ends()[path] > ends()[sampler]
        with rest(url) as http:
            route = f"training_runs/{client.model_id}/checkpoints/weights/lives/ttl"
            assert http.put(route, json={"ttl_seconds": 1}).status_code == 400
            assert http.put(route, json={}).status_code == 400
            assert http.put(route.replace("lives", "other"), json={"ttl_seconds": HOUR}).status_code == 404
