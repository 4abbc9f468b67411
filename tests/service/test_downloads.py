"""Adapters that leave the server by signed addresses, copies of checkpoints, and what is not offered."""

from __future__ import annotations

import io
import json
import os
import tarfile
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import tinker
import torch
from helpers import tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from servers import KEY, SDK_WARNINGS, Direct, adapter, served

from pullback.errors import CheckpointError, NotFoundError, PullbackError, ServiceError
from pullback.service.http.downloads import Downloads, _opened, _tar
from pullback.service.http.not_offered import NOT_OFFERED
from pullback.service.served.listings import Listings
from pullback.service.stored.copies import Copies

# The SDK asks for an adapter on the output projection too, which this base ties to its embeddings; peft remarks on that.
pytestmark = [*SDK_WARNINGS, pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")]
PARAMS = tinker.AdamParams(learning_rate=1e-2)


@pytest.fixture
def trained(service: Any) -> Any:
    """A client whose adapter is no longer the one that it began with."""
    client = service.create_lora_training_client("tiny", rank=2, seed=3).result()
    inputs = {"target_tokens": torch.tensor([2, 3, 4]), "weights": torch.ones(3)}
    datum = tinker.Datum(model_input=tinker.ModelInput.from_ints([1, 2, 3]), loss_fn_inputs=inputs)
    client.forward_backward([datum], "cross_entropy").result()
    client.optim_step(PARAMS).result()
    return client


def rest_client(url: str) -> Any:
    return tinker.RestClient(base_url=url, api_key=KEY)


def fetched(url: str) -> bytes:
    with urllib.request.urlopen(url) as answer:  # as the SDK's own command does, without a key
        return bytes(answer.read())


def logits_of(folder: Path) -> torch.Tensor:
    """Return what the base answers with the adapter in a folder, loaded by peft alone."""
    import peft

    base: Any = tiny_llama(torch.float32).model
    model = peft.PeftModel.from_pretrained(base, str(folder)).eval()
    with torch.no_grad():
        return torch.as_tensor(model(torch.tensor([[1, 2, 3, 4]])).logits)


def logits(client: Any, models: Any) -> torch.Tensor:
    with torch.no_grad():
        model: Any = served(models, client).model
        return torch.as_tensor(model.model(torch.tensor([[1, 2, 3, 4]])).logits)


def test_an_export_is_an_adapter_that_peft_loads(
    service: Any, trained: Any, url: str, models: Any, tmp_path: Path
) -> None:
    """Every file has an address of its own; together they are the adapter, and no more than that."""
    client = rest_client(url)
    path = trained.save_weights_external("final").result().path
    response = client.get_external_weights_urls(path).result()
    assert set(response.urls) == {"adapter_config.json", "adapter_model.safetensors"}
    for name, address in response.urls.items():
        (tmp_path / name).write_bytes(fetched(address))
    torch.testing.assert_close(logits_of(tmp_path), logits(trained, models), atol=1e-6, rtol=0)
    base: Any = tiny_llama(torch.float32).model
    with torch.no_grad():
        untrained = base(torch.tensor([[1, 2, 3, 4]])).logits
    assert float((logits_of(tmp_path) - untrained).abs().max()) > 1e-3
    kinds = {
        one.tinker_path: one.checkpoint_type for one in client.list_checkpoints(trained.model_id).result().checkpoints
    }
    assert kinds[path] == "external"
    with pytest.raises(tinker.RequestFailedError, match="exported for download"):
        service.create_training_client_from_state(path).result()
    with pytest.raises(tinker.RequestFailedError, match=r"exists"):
        trained.save_weights_external("final").result()
    client.delete_checkpoint_from_tinker_path(path).result()
    with pytest.raises(urllib.error.HTTPError, match="404"):
        fetched(response.urls["adapter_config.json"])


def test_an_export_that_only_its_reader_reads(trained: Any, url: str, models: Any, tmp_path: Path) -> None:
    """Encrypted by age: every file bears its suffix, one key opens it, another does not, and nothing is in the clear."""
    pyrage = pytest.importorskip("pyrage", reason="exports are encrypted by pyrage (extra serve)")
    reader, other = pyrage.x25519.Identity.generate(), pyrage.x25519.Identity.generate()
    path = trained.save_weights_external("shut", age_encryption_recipients=[str(reader.to_public())]).result().path
    urls = rest_client(url).get_external_weights_urls(path).result().urls
    assert set(urls) == {"adapter_config.json.age", "adapter_model.safetensors.age"}
    assert {file.name for file in models.checkpoints.locate(path).iterdir()} == {*urls, "manifest.json", "served.json"}
    for name, address in urls.items():
        content = fetched(address)
        (tmp_path / name.removesuffix(".age")).write_bytes(pyrage.decrypt(content, [reader]))
        with pytest.raises(pyrage.DecryptError):
            pyrage.decrypt(content, [other])
    torch.testing.assert_close(logits_of(tmp_path), logits(trained, models), atol=1e-6, rtol=0)
    with pytest.raises(tinker.RequestFailedError, match="no public key"):
        trained.save_weights_external("bad", age_encryption_recipients=["age1nobody"]).result()
    with pytest.raises(tinker.RequestFailedError, match="exists"):
        trained.save_weights_external("shut", age_encryption_recipients=[str(reader.to_public())]).result()


@pytest.mark.parametrize("readers", [[], ["key"] * 11, "age1", [1]])
def test_what_is_no_list_of_readers_is_refused(direct: Any, readers: Any) -> None:
    """Before anything is written, as the user's mistake."""
    answer = direct.read(direct.call("save_external", 1, path="x", age_encryption_recipients=readers))
    assert answer.category == "user"
    assert "age_encryption_recipients must be a list" in answer.text
    assert not direct.journal.checkpoints("me")


def test_the_archive_of_older_releases(trained: Any, url: str, web: Any, models: Any, tmp_path: Path) -> None:
    """A checkpoint of either kind redirects to an archive: the adapter, and the empty file that ends it."""
    http = web(url)
    for path in (trained.save_state("one").result().path, trained.save_weights_for_sampler("one").result().path):
        _, _, model, kind, name = path.split("/")
        answer = http.get(f"training_runs/{model}/checkpoints/{kind}/{name}/archive")
        assert (answer.status_code, "expires" in answer.headers) == (302, True)
        with tarfile.open(fileobj=io.BytesIO(fetched(answer.headers["location"]))) as archive:
            names = archive.getnames()
            archive.extractall(tmp_path / kind, filter="data")
        assert names == ["adapter_config.json", "adapter_model.safetensors", "checkpoint_complete"]
        torch.testing.assert_close(logits_of(tmp_path / kind), logits(trained, models), atol=1e-6, rtol=0)


def test_an_address_leads_to_its_own_file_and_nowhere_else(trained: Any, url: str, web: Any) -> None:
    """Changed in any part it is refused, in words that say nothing of the server; as it was given it is answered."""
    http = web(url)
    path = trained.save_weights_external("signed").result().path
    _, _, model, kind, name = path.split("/")
    address = http.get(f"training_runs/{model}/checkpoints/{kind}/{name}/external_weights_urls").json()["urls"][
        "adapter_config.json"
    ]
    assert json.loads(fetched(address))["peft_type"] == "LORA"
    start, expires, signature, *rest = address.removeprefix(f"{url}/").rsplit("/", 6)
    assert rest[1:] == ["external_weights", "signed", "adapter_config.json"]
    changed = [
        [str(int(expires) + 1), signature, *rest],
        [expires, signature[:-1] + ("0" if signature[-1] != "0" else "1"), *rest],
        ["9" * 5000, signature, *rest],
        ["soon", signature, *rest],
        [expires, "%C3%A9", *rest],
        [expires, signature, rest[0], "weights", *rest[2:]],
        [expires, signature, *rest[:-1], "manifest.json"],
        [expires, signature, *rest[:-1], "adapter_model.safetensors"],
        [expires, signature, *rest[:-2], "..", rest[-1]],
    ]
    for parts in changed:
        answer = httpx.get("/".join([f"{url}/{start}", *parts]))
        assert answer.status_code == 404
    assert "expired" in httpx.get("/".join([f"{url}/{start}", *changed[0]])).json()["detail"]
    assert http.get(f"training_runs/{model}/checkpoints/{kind}/none/external_weights_urls").status_code == 404


@given(sizes=st.lists(st.integers(0, 1500), max_size=4))
def test_an_archive_holds_every_byte(tmp_path_factory: pytest.TempPathFactory, sizes: list[int]) -> None:
    """Whatever the sizes, tarfile reads what was written."""
    folder = tmp_path_factory.mktemp("archive")
    files = {f"adapter_{i}": os.urandom(size) for i, size in enumerate(sizes)}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    with tarfile.open(fileobj=io.BytesIO(b"".join(_tar(_opened(folder, list(files)))))) as archive:
        found = {name: archive.extractfile(name) for name in archive.getnames()}
        assert {name: opened.read() for name, opened in found.items() if opened} == {
            **files,
            "checkpoint_complete": b"",
        }


class Asked:
    """A request, as far as an address is made of one."""

    owner, request = "me", type("Request", (), {"base_url": "http://127.0.0.1:1/"})


def test_an_address_expires(direct: Any) -> None:
    """It is good until its last second, and no longer."""
    now = [1000.0]
    direct.read(direct.call("save_external", 1, path="out"))
    downloads = Downloads(direct.models.checkpoints, Listings(direct.models, direct.journal), 60, lambda: now[0])
    uri = "tinker://sess:train:0/external_weights/out"
    call: Any = Asked()
    expires = downloads._expiry()
    address = downloads._signed(call, uri, "adapter_config.json", expires)
    kind, name, file = address.split("/")[-3:]
    given = {"model": "sess:train:0", "kind": kind, "checkpoint": name, "file": file}
    request: Any = type(
        "Request", (), {"path_params": {**given, "expires": expires, "signature": address.split("/")[-5]}}
    )
    now[0] = 1060.0
    assert downloads._verified(request) == (uri, "adapter_config.json")
    now[0] = 1060.1
    with pytest.raises(NotFoundError, match="expired"):
        downloads._verified(request)


def test_a_copy_outlives_its_source(service: Any, trained: Any, url: str, models: Any) -> None:
    """The SDK copies into a project: the bytes are shared, and training goes on from the copy when the source is gone."""
    client = rest_client(url)
    path = trained.save_state("source").result().path
    copied = client.copy_weights(path, "archive").result()
    assert copied != path
    files = [models.checkpoints.locate(uri) / "adapter_model.safetensors" for uri in (path, copied)]
    assert files[0].stat().st_ino == files[1].stat().st_ino
    run = client.get_training_run(copied.split("/")[2]).result()
    assert run.user_metadata == {"copy_of": path, "destination_project_id": "archive"}
    client.delete_checkpoint_from_tinker_path(path).result()
    other = service.create_training_client_from_state(copied).result()
    torch.testing.assert_close(adapter(served(models, other)), adapter(served(models, trained)), atol=0, rtol=0)


def copies(direct: Direct) -> Copies:
    listings = Listings(direct.models, direct.journal)
    do = direct.operations
    return Copies(direct.models.checkpoints, direct.journal, direct.sequencer, do.sessions, listings, do.require_space)


def test_the_same_request_copies_once(direct: Any) -> None:
    """By its key, before and after a restart; another key, or a run that is named, is another copy."""
    source = direct.read(direct.call("save_weights", 1, path="one"))["path"]
    body = {"source_path": source, "destination_project_id": "p"}
    first = copies(direct).copy("me", body, "key")
    assert copies(direct).copy("me", body, "key") == first
    assert copies(direct.restart()).copy("me", body, "key") == first
    assert copies(direct).copy("me", body, "other") != first
    named = {"source_path": source, "session_id": "sess", "model_seq_id": 7}
    assert copies(direct).copy("me", named, "") == {"tinker_path": "tinker://sess:train:7/weights/one"}
    with pytest.raises(ServiceError, match="another model"):
        copies(direct).copy("me", {**named, "model_seq_id": 0}, "")
    answer = direct.read(
        direct.operations.save_weights("me", b"x", {"model_id": "sess:train:7", "seq_id": 1, "path": "x"})
    )
    assert "not trained on" in answer.text
    assert len(direct.journal.checkpoints("me")) == 4


def test_a_copy_counts_as_what_its_key_holds(direct: Any) -> None:
    """With room for two checkpoints one can be copied; a byte less, and it cannot, and nothing is left of it."""
    source = direct.read(direct.call("save_weights", 1, path="one"))["path"]
    body = {"source_path": source, "destination_project_id": "p"}
    size = direct.models.checkpoints.size(source)
    for quota, good in ((2 * size - 1, False), (2 * size, True)):
        direct.operations.limits = replace(direct.operations.limits, disk_per_key=quota)
        if good:
            assert copies(direct).copy("me", body, "key")
        else:
            with pytest.raises(ServiceError, match="bytes of checkpoints"):
                copies(direct).copy("me", body, "key")
            assert len(direct.journal.checkpoints("me")) == 1


def test_a_copy_expires_by_its_own_time(direct: Any) -> None:
    """An hour after it was made, whatever its source says; without a time it is kept."""
    made = direct.models.checkpoints.clock()
    source = direct.read(direct.call("save_weights", 1, path="one", ttl_seconds=7200))["path"]
    for seconds in (None, 3600):
        body = {"source_path": source, "destination_project_id": "p", "ttl_seconds": seconds}
        uri = copies(direct).copy("me", body, "")["tinker_path"]
        expires = direct.journal.checkpoint(uri)["expires"]
        assert expires is None if seconds is None else made + 3600 <= expires < made + 7200
    assert made + 7200 <= direct.journal.checkpoint(source)["expires"]


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({}, "you", "there is no checkpoint"),
    ({"source_path": "tinker://sess:train:0/weights/two"}, "me", "there is no checkpoint"),
    ({"source_path": "/etc"}, "me", "no checkpoint of this server"),
    ({"destination_project_id": None}, "me", "destination_project_id"),
    ({"weights_access_token": "t"}, "me", "weights_access_token"),
    ({"ttl_seconds": 3599}, "me", "ttl_seconds must be"),
    ({"session_id": "other", "model_seq_id": 1}, "me", "no session"),
]


@pytest.mark.parametrize(("change", "owner", "words"), REFUSED)
def test_what_cannot_be_copied_is_refused(direct: Any, change: dict[str, Any], owner: str, words: str) -> None:
    """In words, and nothing is left on the disk or in the journal."""
    source = direct.read(direct.call("save_weights", 1, path="one"))["path"]
    before = sorted(direct.models.checkpoints.root.rglob("*"))
    with pytest.raises(PullbackError, match=words):
        copies(direct).copy(owner, {"source_path": source, "destination_project_id": "p", **change}, "key")
    assert len(direct.journal.checkpoints("me")) == 1
    assert not direct.journal.models("you")
    assert sorted(direct.models.checkpoints.root.rglob("*")) == before


def test_a_copy_that_fails_half_way_leaves_nothing(direct: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, after the first file; the next attempt succeeds."""
    source = direct.read(direct.call("save_weights", 1, path="one"))["path"]
    body, link, calls = {"source_path": source, "destination_project_id": "p"}, os.link, []

    def full(*given: Any, **options: Any) -> None:
        calls.append(given)
        if len(calls) > 1:
            raise FileNotFoundError(2, "No such file or directory")
        link(*given, **options)

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(CheckpointError, match="ask again"):
        copies(direct).copy("me", body, "key")
    monkeypatch.undo()
    assert len(direct.journal.checkpoints("me")) == 1
    assert not list(direct.models.checkpoints.root.glob("*/weights/.*"))
    copied = copies(direct).copy("me", body, "key")["tinker_path"]
    names = [{file.name for file in direct.models.checkpoints.locate(uri).iterdir()} for uri in (source, copied)]
    assert names[0] == names[1] >= {"adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors"}


def test_what_is_not_offered_says_so(url: str, web: Any) -> None:
    """Every such route answers 400 and says what there is instead; a route that nobody knows is a 404."""
    http = web(url)
    for method, path, words in NOT_OFFERED:
        where = path.replace("{id}", "run:train:0").replace("{checkpoint:path}", "weights/one")
        answer = http.request(method, where, json={} if method in ("POST", "PUT") else None)
        assert (answer.status_code, answer.json()["detail"]) == (400, words)
    assert http.get("bills").status_code == 404


def test_the_sdk_reads_why(trained: Any, url: str) -> None:
    """Publishing and billing raise the SDK's error for a bad request, with the reason in it."""
    client = rest_client(url)
    path = trained.save_state("published").result().path
    with pytest.raises(tinker.BadRequestError, match="not published"):
        client.publish_checkpoint_from_tinker_path(path).result()
    with pytest.raises(tinker.BadRequestError, match="not published"):
        client.unpublish_checkpoint_from_tinker_path(path).result()
    with pytest.raises(tinker.BadRequestError, match="audit"):
        tinker.AdminClient(base_url=url, api_key=KEY).get_audit_log().result()
