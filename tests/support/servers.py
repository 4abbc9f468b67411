"""A service over a tiny model, for tests of the service and of its clients."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from helpers import VOCAB, flop_counter, make_data, tiny_llama, weights_of

from pullback.backends import TorchBackend
from pullback.datums import Datum, to_tinker
from pullback.service import Base, ServedModels
from pullback.service.durability.journal import Journal
from pullback.service.limits import Limits
from pullback.service.operations import Operations
from pullback.service.queueing.sequencer import Sequencer
from pullback.service.served.listings import Listings
from pullback.service.stored.copies import Copies
from pullback.service.wire.protobuf import decode_request, message

KEY = "tml-test"
MODEL = "sess:train:0"
# The SDK leaves its sockets to the garbage collector.
SDK_WARNINGS = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def tiny_models(root: Any, vocab: int = VOCAB) -> ServedModels:
    """Return served models on a random Llama."""
    model: Any = tiny_llama(torch.float32, vocab=vocab).model
    return ServedModels(Base("tiny", model, None, {"token_budget": 64}), root)


def served(models: ServedModels, client: Any) -> TorchBackend:
    """Return the backend behind a training client."""
    return models.backends[client.model_id]


def twin(models: ServedModels, client: Any) -> TorchBackend:
    """Return a native backend on a copy of the client's model."""
    return TorchBackend(copy.deepcopy(served(models, client).model), token_budget=64)


adapter = weights_of  # of a served model


class Counting:
    """Counts the FLOPs of the gradient operations of every native backend in this process, in whichever thread they run."""

    def __enter__(self) -> Counting:
        self.total, self._patch = 0, pytest.MonkeyPatch()
        for name in ("forward_retain", "backward", "forward", "forward_backward"):
            self._patch.setattr(TorchBackend, name, self._counted(getattr(TorchBackend, name)))
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()

    def _counted(self, work: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            with flop_counter() as counter:
                result = work(*args, **kwargs)
            self.total += counter.get_total_flops()
            return result

        return counted


def rest(url: str, key: str = KEY) -> httpx.Client:
    """Return a plain HTTP client."""
    return httpx.Client(base_url=f"{url}/api/v1/", headers={"x-api-key": key}, timeout=120)


def finished(http: httpx.Client, request_id: str) -> Any:
    """Return the answer to a request, as JSON, once there is one."""
    options: Any = {"json": {"request_id": request_id}, "headers": {"accept": "application/json"}}
    while (answer := http.post("retrieve_future", **options)).status_code == 408:
        pass  # each of these is a long poll
    return answer.json()


def new_model(http: httpx.Client, **lora: Any) -> tuple[str, Any]:
    """Create a session and a model in it; return the session and the answer."""
    session = http.post("create_session", json={}).json()["session_id"]
    body = {"session_id": session, "model_seq_id": 0, "base_model": "tiny", "lora_config": {"rank": 2, **lora}}
    return session, finished(http, http.post("create_model", json=body).json()["request_id"])


def sdk_data(seed: int) -> list[Any]:
    """Return four datums of the SDK with what PPO reads."""
    kept = ("target_tokens", "weights", "logprobs", "advantages")
    found = make_data([6, 5, 7, 4], seed)
    return to_tinker([type(d)(d.model_input, {key: d.loss_fn_inputs[key] for key in kept}) for d in found])


def json_datum(tokens: list[int]) -> dict[str, Any]:
    """Return a datum in the JSON form, in which every token is its own target."""
    target = {"data": tokens, "dtype": "int64", "shape": [len(tokens)]}
    weights = {"data": [1.0] * len(tokens), "dtype": "float32", "shape": [len(tokens)]}
    return {
        "model_input": {"chunks": [{"type": "encoded_text", "tokens": tokens}]},
        "loss_fn_inputs": {"target_tokens": target, "weights": weights},
    }


def gradient_body(model: str, seq_id: int, loss: str, without: tuple[str, ...] = ()) -> bytes:
    """Return a forward_backward request as the SDK writes it."""
    request = message("ForwardBackwardRequest")(model_id=model, seq_id=seq_id, loss_fn=loss)
    for datum in make_data([6, 5, 7, 4]):
        add_datum(request, datum, without)
    return bytes(request.SerializeToString())


def add_datum(request: Any, datum: Datum, without: tuple[str, ...] = ()) -> None:
    """Add a datum to a protobuf request, except some of its inputs."""
    target = request.data.add()
    target.model_input.add().encoded_text.tokens = datum.model_input.tokens.int().numpy().tobytes()
    for key, value in datum.loss_fn_inputs.items():
        if key in without:
            continue
        field, tensor = target.loss_fn_inputs[key], value.to_torch()
        field.dense, field.dtype = tensor.numpy().tobytes(), 2 if tensor.dtype == torch.int64 else 1
        field.shape.extend(tensor.shape)


class Direct:
    """A service without its HTTP routes; `restart` returns what a killed one leaves behind."""

    def __init__(self, folder: Path, models: Any = None, limits: Limits | None = None) -> None:
        self.models, limits = models or tiny_models(folder), limits or Limits()
        self.journal = Journal(folder / "journal.sqlite")
        self.sequencer = Sequencer(self.journal, limits)
        self.operations = Operations(self.models, self.journal, self.sequencer, limits, lambda what, amount: None)

    def restart(self) -> Direct:
        for queue in list(self.sequencer._queues.values()):
            queue.close()  # a killed server gives nothing up
        return Direct(self.models.checkpoints.root)

    def start(self) -> None:
        self.journal.add_session("sess", "me", None)
        body = {"session_id": "sess", "model_seq_id": 0, "base_model": "tiny", "lora_config": {"rank": 2}}
        assert self.read(self.operations.create_model("me", json.dumps(body).encode(), body))["model_id"] == MODEL

    def read(self, request: str) -> Any:
        answer = self.sequencer.result("me", request).result(timeout=120)
        self.operations.training.delivered(request)
        return answer

    def gradient(self, seq_id: int, loss: str = "ppo", without: tuple[str, ...] = ()) -> str:
        return self.operations.training.gradient("me", decode_request(gradient_body(MODEL, seq_id, loss, without)))

    def call(self, verb: str, seq_id: int, **extra: Any) -> str:
        body = {"model_id": MODEL, "seq_id": seq_id, "adam_params": {"learning_rate": 1e-2}, **extra}
        part = self.operations.training if verb == "optim_step" else self.operations
        return str(getattr(part, verb)("me", json.dumps(body).encode(), body))


def copies(direct: Direct) -> Copies:
    """Return what copies checkpoints of a service without its routes."""
    do, listings = direct.operations, Listings(direct.models, direct.journal)
    return Copies(direct.models.checkpoints, direct.journal, direct.sequencer, do.sessions, listings, do.require_space)


def trained_client(service: Any) -> Any:
    """Return a client of the SDK whose adapter is no longer the one that it began with."""
    import tinker

    client = service.create_lora_training_client("tiny", rank=2, seed=3).result()
    inputs = {"target_tokens": torch.tensor([2, 3, 4]), "weights": torch.ones(3)}
    datum = tinker.Datum(model_input=tinker.ModelInput.from_ints([1, 2, 3]), loss_fn_inputs=inputs)
    client.forward_backward([datum], "cross_entropy").result()
    client.optim_step(tinker.AdamParams(learning_rate=1e-2)).result()
    return client


def rest_client(url: str) -> Any:
    """Return the SDK's client for what is listed and stored."""
    import tinker

    return tinker.RestClient(base_url=url, api_key=KEY)
