"""What is another key's is answered as what is not there: the same status and the same text, whatever the route."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import KEY, SDK_WARNINGS, finished, gradient_body, json_datum, new_model, rest, tiny_models

from pullback.service import serving
from pullback.service.limits import Limits

pytestmark = SDK_WARNINGS
OTHER = "tml-other"
PROTOBUF = {"content-type": "application/x-protobuf"}
PROMPT = {"chunks": [{"tokens": [1, 2], "type": "encoded_text"}]}


class Client:
    """One key's session, model, saved and sampling weights, and last request."""

    def __init__(self, http: Any, name: str) -> None:
        self.http, self.turn, self.count = http, 0, 1000
        self.session, made = new_model(http)
        self.model = made["model_id"]
        for verb in ("save_weights", "save_weights_for_sampler"):
            answer = http.post(verb, json={"model_id": self.model, "seq_id": self.number(), "path": name})
            self.request = answer.json()["request_id"]
            assert finished(http, self.request)["path"].endswith(f"/{name}")
        body = {"session_id": self.session, "sampling_session_seq_id": 9, "base_model": "tiny"}
        self.sampler = http.post("create_sampling_session", json=body).json()["sampling_session_id"]

    def number(self) -> int:
        self.turn += 1
        return self.turn


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Client, Client]]:
    """Who asks, and whose it is."""
    with ExitStack() as stack:
        models = tiny_models(tmp_path_factory.mktemp("foreign"))
        url = stack.enter_context(serving(models, keys=[KEY, OTHER], limits=Limits(gap_seconds=0.3)))
        asking, owner = (
            Client(stack.enter_context(rest(url, key)), name) for key, name in ((OTHER, "own"), (KEY, "one"))
        )
        yield asking, owner


def _future(answer: Any, http: Any) -> str:
    """Status and text, with those of the operation if one was accepted."""
    if answer.status_code != 200 or "request_id" not in answer.json():
        return f"{answer.status_code} {answer.text}"
    return f"200 {json.dumps(finished(http, answer.json()['request_id']))}"


Ids = dict[str, str]  # model, session, sampler, request, name, kind


def uri(ids: Ids) -> str:
    return f"tinker://{ids['model']}/{ids['kind']}/{ids['name']}"


def named(ids: Ids) -> str:
    """The name by which Fireworks' fork calls a checkpoint."""
    return f"pullback/run-{hashlib.sha256(ids['model'].encode()).hexdigest()[:32]}/{ids['name']}"


def posts(ids: Ids, me: Client) -> dict[str, dict[str, Any]]:
    """A body for every route that takes a name of something; the asking client's own where it must have one."""
    mine = {"model_id": me.model, "seq_id": me.turn + 1}
    theirs = {"model_id": ids["model"], "seq_id": 1}
    inner = {"data": [json_datum([1, 2])], "loss_fn": "cross_entropy"}
    return {
        "weights_info": {"tinker_path": uri(ids)},
        "load_weights": {**mine, "path": uri(ids)},
        "load_weights?": {**mine, "path": named(ids)},
        "create_model": {"session_id": me.session, "model_seq_id": me.count, "path": uri(ids), "optimizer": True},
        "create_model?": {"session_id": ids["session"], "model_seq_id": 0, "base_model": "tiny"},
        "create_sampling_session": {
            "session_id": me.session,
            "sampling_session_seq_id": me.count,
            "model_path": uri(ids),
        },
        "copy_weights": {"source_path": uri(ids), "session_id": me.session, "model_seq_id": me.count},
        "asample": {"sampling_session_id": ids["sampler"], "prompt": PROMPT, "num_samples": 1},
        "get_info": {"model_id": ids["model"]},
        "forward": {**theirs, "forward_input": inner},
        "forward_backward": {**theirs, "forward_backward_input": inner},
        "optim_step": {**theirs, "adam_params": {}},
        "save_weights": {**theirs, "path": ids["name"]},
        "save_weights_for_sampler": {**theirs, "path": ids["name"]},
        "save_weights_external": {**theirs, "path": ids["name"]},
        "load_adapter": theirs,
        "unload_model": {"model_id": ids["model"]},
        "session_heartbeat": {"session_id": ids["session"]},
        "create_custom_loss": {"session_id": ids["session"], "custom_loss_seq_id": 0},
        "retrieve_future": {"request_id": ids["request"]},
    }


def gets(ids: Ids) -> list[tuple[str, str]]:
    checkpoint = f"training_runs/{ids['model']}/checkpoints/{ids['kind']}/{ids['name']}"
    return [
        ("GET", f"training_runs/{ids['model']}"),
        ("GET", f"training_runs/{ids['model']}/checkpoints"),
        ("DELETE", checkpoint),
        ("GET", f"{checkpoint}/archive"),
        ("GET", f"{checkpoint}/external_weights_urls"),
        ("PUT", f"{checkpoint}/ttl"),
        ("GET", f"samplers/{ids['sampler']}"),
        ("GET", f"sessions/{ids['session']}"),
        ("POST", f"sessions/{ids['session']}/finish"),
    ]


def answer(me: Client, route: str, ids: Ids) -> str:
    """What a route says, with the names of the request taken out."""
    method, _, place = route.partition(" ")
    if method == "PROTOBUF":
        packed = gradient_body(ids["model"], 1, "cross_entropy")
        said = _future(me.http.post("forward_backward", content=packed, headers=PROTOBUF), me.http)
    elif method == "BODY":
        me.count += 1
        body = posts(ids, me)[place]
        if body.get("model_id") == me.model:
            me.number()
        said = _future(me.http.post(place.rstrip("?"), json=body), me.http)
    else:
        method, path = gets(ids)[int(place)]
        said = _future(
            me.http.request(method, quote(path, safe="/:"), json={"ttl_seconds": 60} if method == "PUT" else None),
            me.http,
        )
    for text in sorted({uri(ids), named(ids), *ids.values()}, key=len, reverse=True):
        said = said.replace(text, "*")
    return said


def whose(client: Client, name: str = "one", kind: str = "weights") -> Ids:
    return {
        "model": client.model,
        "session": client.session,
        "sampler": client.sampler,
        "request": client.request,
        "name": name,
        "kind": kind,
    }


_SOME: Ids = {"model": "m", "session": "s", "sampler": "x", "request": "r", "name": "n", "kind": "weights"}


class _Nobody:
    model, session, turn, count = "mine", "mine", 0, 0


ALL = [
    "PROTOBUF",
    *(f"BODY {route}" for route in posts(_SOME, _Nobody())),  # type: ignore[arg-type]
    *(f"ROUTE {i}" for i in range(len(gets(_SOME)))),
]


@pytest.mark.parametrize("route", ALL)
@given(
    digits=st.text("0123456789abcdef", min_size=16, max_size=16),
    number=st.integers(0, 3),
    name=st.sampled_from(["one", "two", "x" * 245]),
    kind=st.sampled_from(["weights", "sampler_weights"]),
)
@settings(max_examples=3)
def test_foreign_and_missing(
    two: tuple[Client, Client], route: str, digits: str, number: int, name: str, kind: str
) -> None:
    """Another key's checkpoint that is there, one that it lacks, and a model that nobody has."""
    asking, owner = two
    foreign, lacking = whose(owner, "one", kind), whose(owner, name, kind)
    missing = {
        "model": f"sess-{digits}:train:{number}",
        "session": f"sess-{digits}",
        "sampler": f"sess-{digits}:sample:{number}",
        "request": f"req-{number}-{digits}",
        "name": name,
        "kind": kind,
    }
    said = answer(asking, route, foreign)
    assert said == answer(asking, route, missing)
    assert said == answer(asking, route, lacking)
    assert not said.startswith("2") or '"error"' in said, said


def test_every_route_that_takes_a_name_is_asked(two: tuple[Client, Client]) -> None:
    """Negative control: the owner itself gets other answers to the same questions than a stranger."""
    asking, owner = two
    same = [route for route in ALL if answer(owner, route, whose(owner)) == answer(asking, route, whose(owner))]
    # Operations with numbers and routes that this server does not have say the same to everybody.
    assert {route for route in same if not route.startswith("ROUTE")} <= {"BODY load_adapter"}, same
