"""A service whose journal is damaged while it is down: what the next one on its folder answers, or why it does not start."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from servers import gradient_body, tiny_models

from pullback.errors import ServiceError
from pullback.service import Base, ServedModels
from pullback.service.http.app import build_app
from pullback.service.limits import Keys, Limits

KEYS = ("tml-one", "tml-two")
FILES = ("journal.sqlite", "journal.sqlite-wal")
PROTOBUF = {"content-type": "application/x-protobuf"}
EXPLAINED = "journal"  # a word of every explanation
LIMITS = Limits(poll_seconds=60.0)


@dataclass(frozen=True)
class Question:
    """A request, and whose."""

    key: str
    method: str
    path: str
    body: Any = None

    async def ask(self, http: httpx.AsyncClient) -> tuple[int, Any]:
        """Return the status and the answer."""
        headers = {"x-api-key": self.key, "accept": "application/json"}
        response = await http.request(self.method, self.path, json=self.body, headers=headers)
        return response.status_code, response.json() if response.content else None


class Client:
    """What one key asks a service for."""

    def __init__(self, http: httpx.AsyncClient, key: str) -> None:
        self.http, self.key = http, key
        self.requests: list[str] = []

    async def post(self, path: str, body: Any) -> Any:
        """Return the answer, after that of the request which it names."""
        response = await self.http.post(path, json=body, headers={"x-api-key": self.key})
        answer = response.json()
        return await self.finished(answer["request_id"]) if "request_id" in answer else answer

    async def finished(self, request: str) -> Any:
        """Return the answer to a request."""
        self.requests.append(request)
        headers = {"x-api-key": self.key, "accept": "application/json"}
        given: Any = {"json": {"request_id": request}, "headers": headers}
        while (response := await self.http.post("retrieve_future", **given)).status_code == 408:
            pass  # each of these is a long poll
        return response.json()

    async def work(self, colour: str, saves: bool) -> list[Question]:
        """Train a model, and save it or not; return what can be asked about it later."""
        metadata = {"user_metadata": {"colour": colour}}
        session = (await self.post("create_session", metadata))["session_id"]
        made = {"session_id": session, "model_seq_id": 0, "base_model": "tiny", "lora_config": {"rank": 2}, **metadata}
        model = (await self.post("create_model", made))["model_id"]
        content = gradient_body(model, 1, "ppo")
        sent = await self.http.post("forward_backward", content=content, headers={**PROTOBUF, "x-api-key": self.key})
        await self.finished(sent.json()["request_id"])
        step = {"model_id": model, "seq_id": 2, "adam_params": {"learning_rate": 0.01}}
        await self.post("optim_step", step)
        if saves:
            await self.post("save_weights", {"model_id": model, "seq_id": 3, "path": "one", **metadata})
            await self.post(
                "save_weights_for_sampler", {"model_id": model, "seq_id": 4, "path": "two", "ttl_seconds": 9999}
            )
            sampler = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "tiny"}
            await self.post("create_sampling_session", sampler)
        return [*self._about(session, model, saves), Question(self.key, "POST", "optim_step", step)]

    def _about(self, session: str, model: str, saves: bool) -> list[Question]:
        listings = ["sessions", "training_runs", "checkpoints", "list_checkpoints", f"sessions/{session}"]
        listings += [f"training_runs/{model}", f"training_runs/{model}/checkpoints"]
        asked = [Question(self.key, "GET", path) for path in listings]
        asked += [Question(self.key, "POST", "retrieve_future", {"request_id": one}) for one in self.requests]
        asked.append(Question(self.key, "POST", "get_info", {"model_id": model}))
        if saves:
            asked.append(Question(self.key, "POST", "weights_info", {"tinker_path": f"tinker://{model}/weights/one"}))
            asked.append(Question(self.key, "GET", f"samplers/{session}:sample:0"))
        return asked


class Golden:
    """What a service that was killed left in its folder, and what the next one answers.

    Attributes:
        folder: that was left.
        answers: to `questions`.
    """

    def __init__(self, place: Path) -> None:
        self.base = tiny_models(place).base
        self.place, self.folder, self.questions = place, place / "left", list[Question]()
        asyncio.run(self._make(place / "served"))
        self.count = 0
        self.answers = self.asked(lambda folder: None)
        assert isinstance(self.answers, list)
        refused = [pair for pair in zip(self.questions, self.answers, strict=True) if pair[1][0] != 200]
        assert not refused, refused[0]

    async def _make(self, folder: Path) -> None:
        async with serving_from(folder, self.base) as (http, app):
            self.questions += await Client(http, KEYS[0]).work("crimson", saves=True)
            await asyncio.to_thread(
                app.journal.database.write_back
            )  # so that one part is in the file, and one in the log
            self.questions += await Client(http, KEYS[1]).work("turquoise", saves=False)
            self.questions += await Client(http, KEYS[0]).work("vermilion", saves=True)
            shutil.copytree(folder, self.folder)  # as if it had been killed now

    def asked(self, damage: Callable[[Path], Any]) -> list[tuple[int, Any]] | str:
        """Damage a copy of what was left; return the answers of the next service, or why it does not start."""
        self.count += 1
        copy = self.place / f"copy-{self.count}"
        copy.mkdir()
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.copytree(path, copy / path.name, copy_function=os.symlink)
            elif path.name.startswith("journal") and not path.name.endswith("-shm"):
                shutil.copy(path, copy / path.name)
        damage(copy)
        try:
            return asyncio.run(self._ask(copy))
        except ServiceError as error:
            return str(error)
        finally:
            shutil.rmtree(copy)

    async def _ask(self, folder: Path) -> list[tuple[int, Any]]:
        async with serving_from(folder, self.base) as (http, _):
            answers = []
            for question in self.questions:
                status, answer = await question.ask(http)
                if question.path == "optim_step" and status == 200:  # the first answer, or a failure that says why not
                    again = Question(question.key, "POST", "retrieve_future", {"request_id": answer["request_id"]})
                    status, answer = await again.ask(http)
                answers.append((status, answer))
            return answers

    def wrong(self, answers: Sequence[tuple[int, Any]] | str) -> list[str]:
        """Return what is neither the right answer nor an explanation."""
        if isinstance(answers, str):
            return [] if EXPLAINED in answers else [answers]
        pairs = zip(self.questions, self.answers, answers, strict=True)
        return [
            f"{question}: {given} instead of {right}"
            for question, right, given in pairs
            if given != right and EXPLAINED not in str(given[1])
        ]


class serving_from:
    """A service on a folder, without sockets; gives a client of its routes, and the service."""

    def __init__(self, folder: Path, base: Base, save_seconds: float | None = None) -> None:
        self.app = build_app(ServedModels(base, folder), Keys.of(KEYS), LIMITS, save_seconds)

    async def __aenter__(self) -> tuple[httpx.AsyncClient, Any]:
        self._lifespan = self.app.router.lifespan_context(self.app)
        await self._lifespan.__aenter__()
        transport = httpx.ASGITransport(app=self.app)
        self._http = httpx.AsyncClient(transport=transport, base_url="http://service/api/v1/", timeout=120)
        return self._http, self.app.state.service

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()
        await self._lifespan.__aexit__(None, None, None)


def flipped(name: str, offset: int, mask: int) -> Callable[[Path], None]:
    """Return what changes one byte of a file."""

    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[offset] ^= mask
        (folder / name).write_bytes(content)

    return damage


def settled(damage: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Return what does a damage after the log has been written back, so that all is in the file."""

    def later(folder: Path) -> None:
        db = sqlite3.connect(folder / FILES[0])
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        db.close()
        damage(folder)

    return later


def letter(text: bytes, which: int, mask: int = 1) -> Callable[[Path], None]:
    """Return what changes a letter of one occurrence of a text in the file; occurrences are counted around."""

    def damage(folder: Path) -> None:
        content = bytearray((folder / FILES[0]).read_bytes())
        places = [found.start() for found in re.finditer(re.escape(text), content)]
        content[places[which % len(places)]] ^= mask
        (folder / FILES[0]).write_bytes(content)

    return settled(damage)


def cut(name: str, size: int) -> Callable[[Path], None]:
    """Return what cuts a file to a size."""
    return lambda folder: os.truncate(folder / name, size)
