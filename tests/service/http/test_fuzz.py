"""Bodies that are almost right, on every route: no failure of the server's, no hang, nothing of another owner, no harm."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import torch
from clients.bodies import BODIES, GETS, JSON, PROTOBUF, json_bodies, packed_bodies, proto_bodies
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from servers import KEY, SDK_WARNINGS, adapter, finished, gradient_body, new_model, rest, tiny_models
from tiers import SOAK

from pullback.service import serving
from pullback.service.limits import Limits, digest_of

pytestmark = SDK_WARNINGS
OTHER = "tml-other"
SECRET = "s3cr3t"
EXAMPLES = 10_000 if SOAK else 150
LIMITS = Limits(body_bytes=200_000, tokens=1000, models=8, samples=4, gap_seconds=0.2, poll_seconds=60.0)
ENDS_WITH_IT = ("sessions/SESSION/finish", "unload_model")  # the attacker keeps his own


class Owner:
    """One key's session, model, sampling session and last request; a new model when its numbers are no longer known."""

    def __init__(self, http: Any) -> None:
        self.http = http
        self.renew()

    def renew(self) -> None:
        self.session, made = new_model(self.http)
        self.model, self.turn, self.request = made["model_id"], 1, "none"
        sent = {"session_id": self.session, "sampling_session_seq_id": 99, "base_model": "tiny"}
        self.sampler = self.http.post("create_sampling_session", json=sent).json()["sampling_session_id"]

    def end(self) -> None:
        self.http.post(f"sessions/{self.session}/finish", json={})

    def filled(self, text: str) -> str:
        """A template with this owner's ids."""
        for name in ("SESSION", "MODEL", "SAMPLER", "REQUEST"):
            text = text.replace(name, getattr(self, name.lower()))
        return text

    def do(self, verb: str, **body: Any) -> Any:
        """An operation, and its answer."""
        sent = {"model_id": self.model, "seq_id": self.turn, **body}
        self.turn += 1
        return self.wait(self.http.post(verb, json=sent))

    def wait(self, answer: Any) -> Any:
        self.request = answer.json()["request_id"]
        return finished(self.http, self.request)


class Field:
    """A service with somebody who attacks and somebody who has something to lose."""

    seen: Counter[str]

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        self.models, self.seen = tiny_models(folder), Counter()
        url = stack.enter_context(serving(self.models, keys=[KEY, OTHER], limits=LIMITS))
        self.attacker, self.victim = (Owner(stack.enter_context(rest(url, key))) for key in (OTHER, KEY))
        self.train()
        secret = {"path": f"{SECRET}-name", "user_metadata": {"owner": f"{SECRET}-metadata"}}
        assert SECRET in self.victim.do("save_weights", **secret)["path"]
        self.marks = (SECRET, digest_of(KEY)[:32], KEY, str(folder))

    def train(self) -> float:
        """One step of the victim."""
        body = gradient_body(self.victim.model, self.victim.turn, "ppo")
        self.victim.turn += 1
        http = self.victim.http
        assert "loss_fn_outputs" in self.victim.wait(http.post("forward_backward", content=body, headers=PROTOBUF))
        return float(self.victim.do("optim_step", adam_params={"learning_rate": 1e-2})["metrics"]["grad_norm"])

    def weights(self) -> torch.Tensor:
        return torch.cat([p.flatten() for p in adapter(self.models.backends[self.victim.model]).values()])

    def check(self, answer: Any, sent: Any) -> None:
        """Below 500, and nothing of the victim's, nor where the server keeps it."""
        assert answer.status_code < 500, (sent, answer.text)
        assert not [mark for mark in self.marks if mark in answer.text], (sent, answer.text)
        self.seen[str(answer.status_code)] += 1

    def post(self, route: str, content: bytes, headers: dict[str, str]) -> None:
        """Send; what was accepted must end, and not by a failure of the server's."""
        me = self.attacker
        answer = me.http.post(route, content=content, headers=headers)
        self.check(answer, (route, content[:2000]))
        if answer.status_code != 200 or route == "retrieve_future" or "request_id" not in (found := answer.json()):
            return
        me.request = found["request_id"]
        ended = me.http.post("retrieve_future", json={"request_id": me.request}, headers={"accept": "*/*"})
        self.check(ended, (route, content[:2000]))
        assert ended.status_code == 200, (route, content[:2000], ended.text)
        failed = ended.headers["content-type"] == "application/json" and ended.json()
        assert not failed or failed.get("category", "user") == "user", (route, content[:2000], failed)
        self.seen["refused" if failed and "error" in failed else "done"] += 1
        if found.get("model_id") == me.model and route in NUMBERED:
            me.turn += 1
            if failed and ("did not arrive" in failed.get("error", "") or "given up" in failed.get("error", "")):
                me.end()
                me.renew()


NUMBERED = {route for route, body in BODIES if "seq_id" in body} - {"asample"}


@pytest.fixture(scope="module")
def field(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    with ExitStack() as stack:
        yield Field(stack, tmp_path_factory.mktemp("fuzz"))


@given(data=st.data())
@settings(max_examples=EXAMPLES, phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck))
def attacked(field: Field, data: st.DataObject) -> None:
    """Almost valid JSON and protobuf with everybody's ids, to every route, in every packing."""
    whose = data.draw(st.sampled_from([field.attacker] * 3 + [field.victim]))
    if data.draw(st.integers(0, 9)) == 0:
        route = whose.filled(data.draw(st.sampled_from(GETS)))
        route = data.draw(st.sampled_from([route, route + "/x", route + "/" + quote(data.draw(st.text(max_size=5)))]))
        keys = st.sampled_from(["limit", "offset", "x"])
        query = data.draw(st.dictionaries(keys, st.sampled_from(["0", "-1", "9" * 30, "x", "", "1.5"]), max_size=2))
        field.check(field.attacker.http.get(route, params=query), (route, query))
        return
    template, valid = data.draw(st.sampled_from(BODIES))
    intact = data.draw(st.booleans())  # the attacker's own, so that much of what is asked is also done
    whose = field.victim if template in ENDS_WITH_IT else field.attacker if intact else whose
    if not intact and template in ("forward", "forward_backward") and data.draw(st.booleans()):
        body, headers = data.draw(proto_bodies(whose.model, field.attacker.turn)), PROTOBUF
    else:
        filled = json.loads(whose.filled(json.dumps(valid)))
        if template in NUMBERED:
            filled["seq_id"] = field.attacker.turn
        raw = json.dumps(filled).encode()
        if intact:
            field.post(whose.filled(template), raw, JSON)
            return
        body, headers = data.draw(json_bodies(filled)), data.draw(st.sampled_from([JSON, JSON, JSON, PROTOBUF, {}]))
    packed, encoding = data.draw(packed_bodies(body))
    field.post(whose.filled(template), packed, {**headers, **encoding})


def test_bad_bodies_break_nothing(field: Field, tmp_path: Path, capsys: Any) -> None:
    """After all that, the other owner's weights are what they were, and train on, bit for bit as where nobody attacks."""
    before = field.weights()
    attacked(field)
    assert torch.equal(field.weights(), before)
    assert field.train() > 0
    assert not torch.equal(field.weights(), before)
    assert field.seen["done"] > 10
    with ExitStack() as stack:
        calm = Field(stack, tmp_path)
        calm.train()
        assert torch.equal(calm.weights(), field.weights())
    if EXAMPLES > 1000:
        with capsys.disabled():
            print(f"\n{EXAMPLES} bodies: {dict(field.seen)}")


def test_a_leak_is_noticed(field: Field) -> None:
    """Negative control: the victim's own listing does not pass the check."""
    with pytest.raises(AssertionError, match=SECRET):
        field.check(field.victim.http.get("checkpoints"), "checkpoints")
