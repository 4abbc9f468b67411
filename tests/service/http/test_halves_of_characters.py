"""A surrogate without its other half, which JSON can hold and UTF-8 cannot: refused in plain words, wherever it stands."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from servers import finished, json_datum, new_model, rest, tiny_models

from pullback.errors import ServiceError
from pullback.service import serving
from pullback.service.durability.answers import Failure
from pullback.service.queueing.requirements import failure_of
from pullback.service.wire.texts import require_writable, words_of, writable

HALVES = ("\ud800", "a\udfffb")
PYTHON = ("codec", "Unicode", "surrogates not allowed")


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with serving(tiny_models(tmp_path_factory.mktemp("halves"))) as url, rest(url) as client:
        yield client


def in_words(text: str) -> None:
    assert "half of a character" in text, text
    assert not any(word in text for word in PYTHON), text


@pytest.mark.parametrize("half", HALVES)
def test_ids(http: httpx.Client, half: str) -> None:
    """Each is named; the request is not accepted."""
    for route, key, rest_of in (
        ("get_info", "model_id", {}),
        ("optim_step", "model_id", {"seq_id": 1, "adam_params": {}}),
        ("session_heartbeat", "session_id", {}),
        ("create_model", "session_id", {"model_seq_id": 0, "base_model": "tiny"}),
        ("retrieve_future", "request_id", {}),
        ("asample", "sampling_session_id", {"prompt": {"chunks": [{"tokens": [1]}]}}),
        ("forward", "model_id", {"seq_id": 1, "forward_input": {"data": [], "loss_fn": "cross_entropy"}}),
    ):
        answer = http.post(route, content=as_json({key: half, **rest_of}))
        assert answer.status_code == 400, (route, answer.text)
        in_words(answer.json()["detail"])
        assert answer.json()["detail"].startswith(f"{key} holds"), route


def as_json(body: dict[str, Any]) -> bytes:
    """A body in which halves are escapes, as UTF-8 has none."""
    return json.dumps(body).encode()


def test_names_beside_them(http: httpx.Client) -> None:
    """An input of a datum, a loss, a key of a config: the operation fails by its sender's fault, and the next runs."""
    session, made = new_model(http)
    datum = json_datum([3, 4])
    inputs = datum["loss_fn_inputs"]
    named = {**datum, "loss_fn_inputs": {"\ud800": inputs["weights"]}}
    for number, inner in enumerate(
        (
            {"data": [named], "loss_fn": "ppo"},
            {"data": [datum], "loss_fn": "\ud800"},
            {"data": [datum], "loss_fn": "ppo", "loss_fn_config": {"\ud800": 1.0}},
        ),
        1,
    ):
        body = {"model_id": made["model_id"], "seq_id": number, "forward_backward_input": inner}
        answer = finished(http, http.post("forward_backward", content=as_json(body)).json()["request_id"])
        assert answer["category"] == "user", answer
        assert not any(word in answer["error"] for word in PYTHON), answer
    lora = {"session_id": session, "model_seq_id": 1, "base_model": "\ud800"}
    answer = finished(http, http.post("create_model", content=as_json(lora)).json()["request_id"])
    assert answer["category"] == "user"
    body = {"model_id": made["model_id"], "seq_id": 4, "adam_params": {}}
    assert "metrics" in finished(http, http.post("optim_step", json=body).json()["request_id"])


@given(text=st.text(st.characters(), max_size=5))
def test_what_is_written_down_can_be(text: str) -> None:
    """Whole texts are unchanged, also those with characters beyond the first plane."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        with pytest.raises(ServiceError, match="half of a character"):
            require_writable("id", text)
        in_words(words_of(error))
        in_words(failure_of(error).text)
        assert writable(text).encode()
        assert failure_of(RuntimeError(text)) == Failure(f"RuntimeError: {writable(text)}", "server")
        return
    require_writable("id", text)
    assert writable(text) == text


def test_without_the_words_it_would_be_pythons(tmp_path: Path) -> None:
    """The negative control, and what needs no check."""
    with pytest.raises(UnicodeEncodeError, match="surrogates not allowed"):
        (tmp_path / "a").write_text("\ud800", encoding="utf-8")
    require_writable("id", None)
    require_writable("id", "\U0001f600")
