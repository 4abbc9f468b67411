"""Every field of every request, replaced by what it must not be, or left out: the client's error in words, or an answer."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from clients.bodies import BODIES, JUNK_VALUES
from servers import KEY, SDK_WARNINGS, finished, new_model, rest, tiny_models
from tiers import SOAK

from pullback.service import serving
from pullback.service.limits import Limits

pytestmark = SDK_WARNINGS
GONE = object()
NUMBERED = {route for route, body in BODIES if "seq_id" in body} - {"asample"}
LIMITS = Limits(tokens=1000, models=64, gap_seconds=0.1, poll_seconds=60.0)
SAMPLE = 120
ENDS = ("sessions/SESSION/finish", "unload_model")
# Words that Python has for its own errors: they name no field, and nobody who reads them knows what to do.
UNWORDED = ("object has no attribute", "not supported between instances", "object is not")


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside a JSON value."""
    yield at
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*at, key))
    if isinstance(value, list):
        for i, one in enumerate(value):
            yield from places(one, (*at, i))


def replaced(body: Any, at: tuple[Any, ...], junk: Any) -> Any:
    if not at:
        return junk
    changed = copy.deepcopy(body)
    inner = changed
    for key in at[:-1]:
        inner = inner[key]
    if junk is GONE:
        del inner[at[-1]]
    else:
        inner[at[-1]] = junk
    return changed


CASES = [
    (i, at, junk)
    for i, (_, body) in enumerate(BODIES)
    for at in places(body)
    for junk in [*JUNK_VALUES, *([GONE] if at else [])]
]


_FIRST = ("forward_input", "data", 0)
# What failed once: always asked, whatever the sample.
FOUND: list[tuple[str, tuple[Any, ...], Any]] = [
    ("forward", ("forward_input",), None),
    ("forward", ("forward_input", "data"), -1),
    ("forward", ("forward_input", "loss_fn_config"), True),
    ("forward", (*_FIRST, "loss_fn_inputs"), [[]]),
    ("forward", (*_FIRST, "loss_fn_inputs", "target_tokens"), 1),
    ("forward", (*_FIRST, "loss_fn_inputs", "weights", "shape"), 2**63),
    ("forward", (*_FIRST, "model_input", "chunks"), "x"),
    ("optim_step", ("optimizer_params",), -1),
    ("optim_step", ("optimizer_params",), None),
    ("create_model", ("optimizer_config",), -1),
    ("asample", ("prompt", "chunks"), True),
]


def found_once() -> list[tuple[int, tuple[Any, ...], Any]]:
    bodies = [(i, route, list(places(body))) for i, (route, body) in enumerate(BODIES)]
    return [(i, at, junk) for route, at, junk in FOUND for i, one, known in bodies if one == route and at in known]


class Asking:
    """A client whose model is made anew when its numbers are no longer known."""

    def __init__(self, http: Any) -> None:
        self.http = http
        self.renew()

    def renew(self) -> None:
        self.session, made = new_model(self.http)
        self.ids, self.turn = {"SESSION": self.session, "MODEL": made["model_id"], "REQUEST": "none"}, 1
        for kind, verb, name in (
            ("weights", "save_weights", "one"),
            ("sampler_weights", "save_weights_for_sampler", "two"),
        ):
            body = {"model_id": self.ids["MODEL"], "seq_id": self.turn, "path": name}
            self.turn += 1
            assert kind in finished(self.http, self.http.post(verb, json=body).json()["request_id"])["path"]
        sent = {"session_id": self.session, "sampling_session_seq_id": 99, "base_model": "tiny"}
        self.ids["SAMPLER"] = self.http.post("create_sampling_session", json=sent).json()["sampling_session_id"]

    def filled(self, text: str) -> str:
        for name, value in self.ids.items():
            text = text.replace(name, value)
        return text

    def ask(self, case: tuple[int, tuple[Any, ...], Any]) -> tuple[int, Any]:
        """Send one changed body; return the status, and the answer or that of the operation."""
        i, at, junk = case
        route, body = BODIES[i]
        if "seq_id" in body and route in NUMBERED:
            body = {**body, "seq_id": self.turn}
        sent = self.filled(json.dumps(replaced(body, at, junk)))
        answer = self.http.post(self.filled(route), content=sent, headers={"accept": "application/json"})
        content: Any = answer.json() if answer.content else None
        if route in ENDS and answer.status_code < 300:
            self.renew()
            return answer.status_code, content
        if answer.status_code == 200 and route != "retrieve_future" and "request_id" in content:
            self.ids["REQUEST"], numbered = content["request_id"], content.get("model_id") == self.ids["MODEL"]
            self.turn += int(numbered and route in NUMBERED)
            content = finished(self.http, content["request_id"])
            if "did not arrive" in str(content) or "given up" in str(content):
                self.renew()
        return answer.status_code, content


@pytest.fixture(scope="module")
def asking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Asking, Path]]:
    with ExitStack() as stack:
        folder = tmp_path_factory.mktemp("fields")
        url = stack.enter_context(serving(tiny_models(folder), keys=[KEY], limits=LIMITS))
        yield Asking(stack.enter_context(rest(url))), folder


def problem(status: int, content: Any, folder: Path) -> str | None:
    """What is wrong with an answer, if anything."""
    text = json.dumps(content)
    if status >= 500:
        return "the server's failure"
    if isinstance(content, dict) and content.get("category", "user") != "user":
        return "an operation that failed by the server's fault"
    if str(folder) in text:
        return "a path of the server"
    said = content.get("detail", content.get("error", "")) if isinstance(content, dict) else ""
    return next((f"words that nobody understands: {words}" for words in UNWORDED if words in str(said)), None)


def failures(asking: Asking, folder: Path, cases: list[tuple[int, tuple[Any, ...], Any]]) -> list[str]:
    found = []
    for i, at, junk in cases:
        status, content = asking.ask((i, at, junk))
        wrong = problem(status, content, folder)
        if wrong:
            shown = "left out" if junk is GONE else repr(junk)[:40]
            found.append(f"{BODIES[i][0]} {at} {shown}: {wrong}: {status} {json.dumps(content)[:200]}")
    return found


def test_every_field(asking: tuple[Asking, Path], capsys: Any) -> None:
    """Each change alone; a sample of them, or in the long run all."""
    cases = found_once() + (CASES if SOAK else random.Random(0).sample(CASES, SAMPLE))
    assert len(found_once()) >= len(FOUND)
    found = failures(*asking, cases)
    assert not found, "\n".join(found)
    if SOAK:
        with capsys.disabled():
            print(f"\n{len(cases)} requests with one field changed")


def test_a_bad_answer_is_noticed(tmp_path: Path) -> None:
    """Negative control: each kind of answer that must not be."""
    for status, content in [
        (500, None),
        (200, {"error": "OSError: x", "category": "server"}),
        (400, {"detail": f"{tmp_path}/x is not there"}),
        (400, {"detail": "malformed request: 'int' object has no attribute 'get'"}),
    ]:
        assert problem(status, content, tmp_path)
    assert problem(400, {"detail": "seq_id must be of type int, got str"}, tmp_path) is None
