"""What a client gets wrong in names and numbers is his error, in words that name the field and no folder of the server."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from servers import KEY, SDK_WARNINGS, Direct, adapter, finished, gradient_body, new_model, rest, tiny_models

from pullback import AdamParams
from pullback.backends.native.checkpoints.files import new_folder, unfinished
from pullback.backends.native.models.lora import LoraChoice
from pullback.backends.native.optimizer import Optimizer
from pullback.errors import CheckpointError, ConfigError
from pullback.service import Base, ServedModels, serving
from pullback.service.durability.checkpoints import Checkpoints

pytestmark = SDK_WARNINGS
PROTOBUF = {"content-type": "application/x-protobuf"}
LONGEST = 245
HUGE = 10**400


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path, ServedModels]]:
    """A client of a service, the folder of the service, and its models."""
    folder = tmp_path_factory.mktemp("refusals")
    models = tiny_models(folder)
    with serving(models, keys=[KEY]) as url, rest(url) as http:
        yield http, folder, models


class Numbered:
    """A model whose operations count themselves."""

    def __init__(self, http: Any) -> None:
        self.http, self.turn = http, 1
        self.session, made = new_model(http)
        self.model = made["model_id"]

    def __call__(self, verb: str, **body: Any) -> Any:
        sent = json.dumps({"model_id": self.model, "seq_id": self.turn, **body})
        self.turn += 1
        answer = self.http.post(verb, content=sent)
        return finished(self.http, answer.json()["request_id"]) if answer.status_code == 200 else answer.json()


def refused(answer: Any, folder: Path, words: str) -> None:
    assert answer.get("category") == "user", answer
    assert words in answer["error"], answer
    assert str(folder) not in answer["error"], answer


LORA: dict[str, list[Any]] = {
    "alpha": [-1, 0, math.nan, math.inf, 1e300, 1e-300, "x", True, [], HUGE],
    "rank": [2.5, True, "2", -1, [2]],
    "seed": [2**64, -(2**63) - 1, 1.5, "1", True, HUGE],
    "train_attn": ["yes", 1, 0.0, []],
    "train_mlp": ["no"],
    "train_unembed": [{}, 2],
}
ADAM: dict[str, list[Any]] = {
    "learning_rate": [-1, 1e300, math.nan, math.inf, "1", True, [], HUGE, 1.1e20],
    "beta1": [math.nan, 1, 1.5, -0.1, "x", HUGE],
    "beta2": [math.nan, 1.0, [0.9]],
    "eps": [0, -1, 1e-50, math.nan, "x", 1e300],
    "weight_decay": [-1, math.nan, 1e300, {}],
    "grad_clip_norm": [-1, math.inf, 1e300, "x"],
}


@pytest.mark.parametrize("field", LORA)
def test_adapters_settings(place: tuple[Any, Path, ServedModels], field: str) -> None:
    """Each wrong value fails the creation, and no model is made."""
    http, folder, models = place
    before = set(models.backends)
    session = http.post("create_session", json={}).json()["session_id"]
    for i, value in enumerate(LORA[field]):
        body = {"session_id": session, "model_seq_id": i, "base_model": "tiny"}
        sent = json.dumps({**body, "lora_config": {"rank": 2, field: value}})
        answer = finished(http, http.post("create_model", content=sent).json()["request_id"])
        refused(answer, folder, field)
        assert len(answer["error"]) < 200
    assert set(models.backends) == before


@pytest.mark.parametrize("field", ADAM)
def test_optimizers_parameters(place: tuple[Any, Path, ServedModels], field: str) -> None:
    """Each wrong value fails the step; the gradient stays, and a right step is made of it."""
    http, folder, models = place
    model = Numbered(http)
    body = gradient_body(model.model, model.turn, "cross_entropy")
    model.turn += 1
    finished(http, http.post("forward_backward", content=body, headers=PROTOBUF).json()["request_id"])
    before = adapter(models.backends[model.model])
    for value in ADAM[field]:
        refused(model("optim_step", adam_params={"learning_rate": 1e-3, field: value}), folder, field)
    assert all(torch.equal(p, before[name]) for name, p in adapter(models.backends[model.model]).items())
    assert model("optim_step", adam_params={"learning_rate": 1e-3})["metrics"]["grad_norm"] > 0


@given(
    learning_rate=st.floats(0, 1e20),
    beta1=st.floats(0, 1, exclude_max=True),
    beta2=st.floats(0, 1, exclude_max=True),
    eps=st.floats(2e-38, 1e20),
    weight_decay=st.floats(0, 1e20),
    clip=st.floats(0, 1e20),
)
def test_what_is_taken_makes_a_finite_step(
    learning_rate: float, beta1: float, beta2: float, eps: float, weight_decay: float, clip: float
) -> None:
    """From fp32 weights and a gradient with zeros in it."""
    if learning_rate * weight_decay > 1e20:
        with pytest.raises(ConfigError, match="learning_rate times weight_decay"):
            AdamParams(learning_rate, weight_decay=weight_decay)
        weight_decay = 1e20 / (2 * learning_rate)
    weights = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.0]))
    weights.grad = torch.tensor([0.0, 1e-3, 5.0])
    Optimizer({"w": weights}).step(AdamParams(learning_rate, beta1, beta2, eps, weight_decay, clip), 1.0)
    assert bool(torch.isfinite(weights).all())


def test_an_eps_that_is_nothing_in_fp32_would_not() -> None:
    """Negative control: what is refused is refused for a reason."""
    weights = torch.nn.Parameter(torch.zeros(2))
    weights.grad = torch.tensor([0.0, 1.0])
    torch.optim.AdamW([weights], lr=0.1, eps=1e-50).step()
    assert not bool(torch.isfinite(weights).all())
    with pytest.raises(ConfigError, match="eps must be at least"):
        AdamParams(eps=1e-50)


def test_a_journals_choice_is_taken_as_it_is() -> None:
    """What earlier versions let through can still be listed."""
    assert LoraChoice.from_json(json.dumps({"rank": 2, "alpha": -1, "train_attn": "yes"})).alpha == -1
    with pytest.raises(ConfigError, match="alpha"):
        LoraChoice(2, alpha=-1).checked()


NAMES = [
    "x" * (LONGEST + 1),
    "x" * 255,
    "x" * 5000,
    "é",
    "é" * 128,
    "a/b",
    "../a",
    ".a",
    "a\0b",
    "a\n",
    "",
    "\ud800",
    "a b",
]


@pytest.mark.parametrize("verb", ["save_weights", "save_weights_for_sampler"])
def test_names(place: tuple[Any, Path, ServedModels], verb: str) -> None:
    """Up to the longest that a file system takes with all that saving adds; what is refused leaves no file."""
    http, folder, _ = place
    model = Numbered(http)
    for name in [*NAMES, 5, ["a"], True]:
        answer = model(verb, path=name)
        if "detail" in answer:  # refused before it was accepted: the number is free
            model.turn -= 1
            assert "path" in answer["detail"]
        else:
            refused(answer, folder, "checkpoint name")
    saved = folder / model.model.replace(":", "_")
    assert not saved.exists() or not [p for p in saved.rglob("*") if p.is_file()]
    longest = "x" * LONGEST
    path = model(verb, path=longest)["path"]
    assert path.endswith(f"/{longest}")
    refused(model(verb, path=longest), folder, f"checkpoint {path} exists")
    assert model(verb, path=longest, overwrite=True)["path"] == path
    checkpoint = path.split("/", 3)[3]
    assert http.delete(f"training_runs/{model.model}/checkpoints/{checkpoint}").status_code == 204
    assert not [p for p in saved.rglob("*") if p.is_file()]


@given(length=st.integers(1, 300))
def test_the_limit_of_a_name_is_the_file_systems(length: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A name is taken if and only if everything that saving, replacing and deleting makes of it can be made."""
    root, name = tmp_path_factory.mktemp("names"), "x" * length
    try:
        final = new_folder(root, name, overwrite=True)
    except CheckpointError:
        assert length > LONGEST
        with pytest.raises(CheckpointError, match="no checkpoint of this server"):
            Checkpoints.parts(f"tinker://model/weights/{name}")
        with pytest.raises(OSError, match="too long"), unfinished(root / name):
            pass
        return
    assert length <= LONGEST
    assert Checkpoints.parts(f"tinker://model/weights/{name}")[2] == name
    for _ in range(2):
        with unfinished(final) as folder:
            (folder / "file").write_text("x")
    assert [p.name for p in root.iterdir()] == [name]


def test_uris_of_what_cannot_be(place: tuple[Any, Path, ServedModels]) -> None:
    """Names and models too long, parts too many, other schemes: of nobody, in words."""
    http, folder, _ = place
    model = Numbered(http)
    for uri in [
        f"tinker://{model.model}/weights/{'x' * 300}",
        f"tinker://{'m' * 5000}/weights/x",
        "tinker://",
        "x://a",
    ]:
        refused(model("load_weights", path=uri), folder, "checkpoint")
        for answer in (
            http.post("weights_info", json={"tinker_path": uri}),
            http.post(
                "create_sampling_session",
                json={"session_id": model.session, "sampling_session_seq_id": 1, "model_path": uri},
            ),
        ):
            assert answer.status_code in (400, 404), answer.text
            assert str(folder) not in answer.text


@pytest.mark.parametrize("damage", ["manifest.json", "adapter_config.json", "adapter_model.safetensors", "gone"])
def test_damaged_checkpoints_are_named_by_their_uri(place: tuple[Any, Path, ServedModels], damage: str) -> None:
    """Whatever reads them: loading, creating, sampling, asking about them."""
    http, folder, _ = place
    model = Numbered(http)
    path = model("save_weights", path="one")["path"]
    files = folder / model.model.replace(":", "_") / "weights" / "one"
    if damage == "gone":
        (files / "adapter_config.json").unlink()
        (files / "adapter_model.safetensors").unlink()
    else:
        (files / damage).write_text("{")
    answer = model("load_weights", path=path)
    refused(answer, folder, "weights/one")
    created = {"session_id": model.session, "model_seq_id": 1, "path": path}
    assert str(folder) not in json.dumps(finished(http, http.post("create_model", json=created).json()["request_id"]))
    assert str(folder) not in http.post("weights_info", json={"tinker_path": path}).text
    sampling = {"session_id": model.session, "sampling_session_seq_id": 1, "model_path": path}
    session = http.post("create_sampling_session", json=sampling).json()["sampling_session_id"]
    asked = {"sampling_session_id": session, "prompt": {"chunks": [{"tokens": [1], "type": "encoded_text"}]}}
    asked["sampling_params"] = {"max_tokens": 1}
    refused(finished(http, http.post("asample", json=asked).json()["request_id"]), folder, "weights/one")


def other_base() -> Any:
    """The tiny model with one matrix scaled: the same shapes."""
    model: Any = tiny_llama(torch.float32).model
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    return model


@pytest.mark.parametrize("same", [True, False])
def test_a_sampler_on_another_base(tmp_path: Path, same: bool) -> None:
    """Weights that were trained on other frozen weights do not sample, nor train, and the refusal says why."""
    first = Direct(tmp_path)
    first.start()
    uris = [first.read(first.call(verb, i + 1, path="one"))["path"] for i, verb in enumerate(SAVES)]
    first.sequencer.close()
    base: Any = tiny_llama(torch.float32).model if same else other_base()
    models = ServedModels(Base("tiny", base, None, {"token_budget": 64}), tmp_path)
    models.create("other", LoraChoice(2))
    for uri in uris:
        if same:
            assert models.saved_sampler(uri).vocab_size
            models.load("other", uri, optimizer=False)
            continue
        for use in (models.saved_sampler, lambda uri: models.load("other", uri, optimizer=False)):
            with pytest.raises(CheckpointError, match=f"^{uri} was trained on other frozen weights"):
                use(uri)


SAVES = ("save_weights", "save_for_sampler")
