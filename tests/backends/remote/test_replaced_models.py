"""A load makes another model at the service; the one that it takes the place of does not stay in memory there."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest
import tinker
from helpers import make_data
from servers import KEY, SDK_WARNINGS

import pullback
from pullback.backends import AdamParams

pytestmark = [*SDK_WARNINGS, pytest.mark.slow]
DATA = make_data([6, 5])


def test_loads_take_no_more_room(connect: Any, models: Any) -> None:
    """However many there are; each is trained on."""
    backend = connect()
    path = backend.save_state("start").result().path
    before = len(models.backends)
    for _ in range(3):
        backend.load_state(path).result()
        backend.forward_backward(DATA, "ppo").result()
        assert backend.optim_step(AdamParams()).result().stepped
    assert len(models.backends) == before
    assert backend.trainer.model_id in models.backends


def test_what_is_under_way_is_not_cut_off(connect: Any, models: Any) -> None:
    """A model whose answer is waited for stays, until its session ends."""
    backend = connect()
    path = backend.save_state("there").result().path
    old, waiting = backend.trainer.model_id, Future[Any]()
    sent = backend._remote._dispatch.sent([waiting], list)
    backend.load_state(path).result()
    assert old in models.backends
    waiting.set_result("here")
    assert sent.future("forward").result() == ["here"]
    old = backend.trainer.model_id
    backend.load_state(path).result()
    assert old not in models.backends


def test_what_was_made_by_others_is_theirs(url: str, models: Any) -> None:
    """A client that the user has given is not told of to the service; nor is a service of the plain protocol."""
    with tinker.ServiceClient(base_url=url, api_key=KEY) as service:
        backend = pullback.connect(service, base_model="tiny", rank=4)
        path, old = backend.save_state("mine").result().path, backend.trainer.model_id
        backend.load_state(path).result()
        assert old in models.backends
