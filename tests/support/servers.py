"""A service over a tiny model, for the tests of both of its sides."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from helpers import VOCAB, flop_counter, make_data, tiny_llama
from torch import Tensor

from pullback.backends import TorchBackend
from pullback.service import Base, ServedModels
from pullback.service.durability.journal import Journal
from pullback.service.durability.sequencer import Sequencer
from pullback.service.limits import Limits
from pullback.service.served.handlers import Operations
from pullback.service.wire.protobuf import decode_request, message

KEY = "tml-test"
MODEL = "sess:train:0"
# The SDK leaves its sockets to the garbage collector.
SDK_WARNINGS = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def tiny_models(root: Any, vocab: int = VOCAB) -> ServedModels:
    """Models on a random Llama."""
    model: Any = tiny_llama(torch.float32, vocab=vocab).model
    return ServedModels(Base("tiny", model, None, {"token_budget": 64}), root)


def served(models: ServedModels, client: Any) -> TorchBackend:
    """The backend behind a training client."""
    return models.backends[client.model_id]


def twin(models: ServedModels, client: Any) -> TorchBackend:
    """A native backend on a copy of the client's model."""
    return TorchBackend(copy.deepcopy(served(models, client).model), token_budget=64)


def adapter(backend: TorchBackend) -> dict[str, Tensor]:
    """What is trained."""
    return {name: p.detach().clone() for name, p in backend.model.named_parameters() if p.requires_grad}


class Counting:
    """FLOPs of the gradient operations of every native backend in this process, whichever thread runs them."""

    def __enter__(self) -> Counting:
        self.total, self._patch = 0, pytest.MonkeyPatch()
        for name in ("hold", "pull", "forward", "forward_backward"):
            self._patch.setattr(TorchBackend, name, self._counted(getattr(TorchBackend, name)))
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()

    def _counted(self, work: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            with flop_counter() as counter:
                found = work(*args, **kwargs)
            self.total += counter.get_total_flops()
            return found

        return counted


def rest(url: str, key: str = KEY) -> httpx.Client:
    """A plain HTTP client."""
    return httpx.Client(base_url=f"{url}/api/v1/", headers={"x-api-key": key}, timeout=30)


def finished(http: httpx.Client, request_id: str) -> Any:
    """The answer to a request, as JSON."""
    asked: Any = {"json": {"request_id": request_id}, "headers": {"accept": "application/json"}}
    while (answer := http.post("retrieve_future", **asked)).status_code == 408:
        pass  # the service holds each of these for a while
    return answer.json()


def new_model(http: httpx.Client, **lora: Any) -> tuple[str, Any]:
    """A session, and the answer to the creation of a model in it."""
    session = http.post("create_session", json={}).json()["session_id"]
    body = {"session_id": session, "model_seq_id": 0, "base_model": "tiny", "lora_config": {"rank": 2, **lora}}
    return session, finished(http, http.post("create_model", json=body).json()["request_id"])


def json_datum(tokens: list[int]) -> dict[str, Any]:
    """A datum in the JSON form; every token is its own target."""
    target = {"data": tokens, "dtype": "int64", "shape": [len(tokens)]}
    weights = {"data": [1.0] * len(tokens), "dtype": "float32", "shape": [len(tokens)]}
    return {
        "model_input": {"chunks": [{"type": "encoded_text", "tokens": tokens}]},
        "loss_fn_inputs": {"target_tokens": target, "weights": weights},
    }


def gradient_body(model: str, seq_id: int, loss: str, without: tuple[str, ...] = ()) -> bytes:
    """A forward_backward request as the SDK writes it."""
    request = message("ForwardBackwardRequest")(model_id=model, seq_id=seq_id, loss_fn=loss)
    for datum in make_data([6, 5, 7, 4]):
        one = request.data.add()
        one.model_input.add().encoded_text.tokens = datum.model_input.tokens.int().numpy().tobytes()
        for key, value in datum.loss_fn_inputs.items():
            if key in without:
                continue
            tensor = value.to_torch()
            one.loss_fn_inputs[key].dense = tensor.numpy().tobytes()
            one.loss_fn_inputs[key].dtype = 2 if tensor.dtype == torch.int64 else 1
            one.loss_fn_inputs[key].shape.extend(tensor.shape)
    return bytes(request.SerializeToString())


class Direct:
    """A service without its routes; `restart` is what remains of it after a kill."""

    def __init__(self, folder: Path, models: Any = None) -> None:
        self.models = models or tiny_models(folder)
        self.journal = Journal(folder / "journal.sqlite")
        self.sequencer = Sequencer(self.journal, gap_seconds=0.2)
        self.operations = Operations(self.models, self.journal, self.sequencer, Limits(), lambda what, amount: None)

    def restart(self) -> Direct:
        return Direct(self.models.checkpoints.root)

    def start(self) -> None:
        self.journal.add_session("sess", "me", None)
        given = {"session_id": "sess", "model_seq_id": 0, "base_model": "tiny", "lora_config": {"rank": 2}}
        assert self.read(self.operations.create_model("me", json.dumps(given).encode(), given))["model_id"] == MODEL

    def read(self, request: str) -> Any:
        answer = self.sequencer.result("me", request).result(timeout=30)
        self.operations.training.delivered(request)
        return answer

    def gradient(self, seq_id: int, loss: str = "ppo", without: tuple[str, ...] = ()) -> str:
        return self.operations.training.gradient("me", decode_request(gradient_body(MODEL, seq_id, loss, without)))

    def call(self, verb: str, seq_id: int, **extra: Any) -> str:
        given = {"model_id": MODEL, "seq_id": seq_id, "adam_params": {"learning_rate": 1e-2}, **extra}
        part = self.operations.training if verb == "optim_step" else self.operations
        return str(getattr(part, verb)("me", json.dumps(given).encode(), given))
