"""A service without its HTTP routes that is asked for samples."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_llama
from servers import Direct

from pullback.backends.native import HFModel
from pullback.backends.native.decoding.batch import ContinuousBatch
from pullback.service import Base, ServedModels
from pullback.service.wire.protobuf import message

__all__ = ["Forwards", "Sampling", "Steps"]

PARAMS = {"max_tokens", "temperature", "top_k", "top_p", "stop", "seed"}


class Sampling:
    """A service in fp64 without its HTTP routes, and sampling sessions on it."""

    def __init__(self, folder: Path) -> None:
        model: Any = tiny_llama(torch.float64).model
        self.direct = Direct(folder, ServedModels(Base("tiny", model, None, {"token_budget": 64}), folder))
        self.direct.start()
        self.samplers, self.calls = self.direct.operations.samplers, 0
        self.base = self.session("me")

    def session(self, owner: str, path: str | None = None) -> str:
        self.calls += 1
        session = f"{owner}:sample:{self.calls}"
        self.samplers.create(session, owner, {"base_model": "tiny"} if path is None else {"model_path": path})
        return session

    def ask(self, session: str, prompt: list[int], n: int = 1, **asked: Any) -> tuple[str, str]:
        """Send a request; return its owner and its id."""
        params = {name: asked.pop(name) for name in list(asked) if name in PARAMS}
        self.calls += 1
        body = {
            "sampling_session_id": session,
            "seq_id": self.calls,
            "num_samples": n,
            "prompt": {"chunks": [{"tokens": prompt, "type": "encoded_text"}]},
            "sampling_params": {"stop": [], **params},
            **asked,
        }
        owner = session.split(":")[0]
        return owner, self.samplers.sample(owner, json.dumps(body).encode(), body)["request_id"]

    def read(self, owner: str, request: str) -> Any:
        return self.direct.sequencer.result(owner, request).result(timeout=120)

    def tokens(self, owner: str, request: str) -> list[list[int]]:
        answer = self.read(owner, request)
        assert isinstance(answer, bytes), answer
        response = message("SampleResponse")()
        response.ParseFromString(answer)
        return [torch.frombuffer(bytearray(s.tokens), dtype=torch.int32).tolist() for s in response.sequences]

    def held(self) -> threading.Event:
        """Let the worker wait, so that what is sent meanwhile is there when it goes on."""
        let_go = threading.Event()
        self.direct.sequencer.run(let_go.wait)
        return let_go


class Steps:
    """Counts the steps of all batches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, advance = 0, ContinuousBatch.advance

        def counted(batch: ContinuousBatch) -> None:
            self.count += 1
            advance(batch)

        monkeypatch.setattr(ContinuousBatch, "advance", counted)


class Forwards:
    """Counts the forwards of all models."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        for name in ("cached_states", "hidden_states"):
            monkeypatch.setattr(HFModel, name, self._counted(getattr(HFModel, name)))

    def _counted(self, right: Any) -> Any:
        def counted(model: HFModel, *given: Any) -> Any:
            self.count += 1
            return right(model, *given)

        return counted
