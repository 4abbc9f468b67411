"""Adapters that leave the server by signed addresses, and what is not offered."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import tarfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import pytest
import tinker
import torch
from helpers import tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from servers import KEY, SDK_WARNINGS, rest_client, served, trained_client

from pullback.errors import NotFoundError
from pullback.service.http.downloads import Downloads, _opened, _tar
from pullback.service.http.not_offered import NOT_OFFERED
from pullback.service.served.listings import Listings

# The SDK asks for an adapter on the output projection too, which this base ties to its embeddings; peft remarks on that.
pytestmark = [*SDK_WARNINGS, pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")]


@pytest.fixture
def trained(service: Any) -> Any:
    return trained_client(service)


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
    (folder / "manifest.json").write_bytes(b"what it is")
    version = hashlib.sha256(b"what it is").hexdigest()[:32]
    with tarfile.open(fileobj=io.BytesIO(b"".join(_tar(_opened(folder, list(files), version))))) as archive:
        found = {name: archive.extractfile(name) for name in archive.getnames()}
        assert {name: opened.read() for name, opened in found.items() if opened} == {
            **files,
            "checkpoint_complete": b"",
        }


class Asked:
    """A request, as far as an address is made of one."""

    owner, request = "me", type("Request", (), {"base_url": "http://127.0.0.1:1/"})


def reading(address: str) -> Any:
    """A request for an address, as far as it is read."""
    parts = ("expires", "signature", "model", "kind", "checkpoint", "file")
    return type("Request", (), {"path_params": dict(zip(parts, map(unquote, address.split("/")[-6:]), strict=True))})


async def answered(downloads: Downloads, address: str) -> tuple[int, bytes]:
    """The status and the body of the answer to an address."""
    response = await downloads.file(reading(address))
    parts = response.body_iterator if hasattr(response, "body_iterator") else None
    body = response.body if parts is None else b"".join([part async for part in parts])
    assert parts is None or "tar" in response.media_type or int(response.headers["content-length"]) == len(body)
    return response.status_code, body


NAMES = ("adapter_config.json", "adapter_model.safetensors", "archive.tar")


@pytest.mark.parametrize("trained_between", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_an_address_leads_to_the_checkpoint_that_it_was_given_for(direct: Any, trained_between: bool) -> None:
    """Overwritten between two files, no second one is sent, in words; one that says the same is the same checkpoint."""
    direct.read(direct.call("save_for_sampler", 1, path="one"))
    downloads = Downloads(direct.models.checkpoints, Listings(direct.models, direct.journal))
    uri = "tinker://sess:train:0/sampler_weights/one"
    call: Any = Asked()

    def addresses() -> list[str]:
        expires, version = downloads._expiry(), downloads._version(uri)
        return [downloads._signed(call, uri, name, expires, version) for name in NAMES]

    async def read() -> None:
        given = addresses()
        before = [await answered(downloads, address) for address in given]
        assert [status for status, _ in before] == [200, 200, 200]
        assert before[1][1] in before[2][1]
        unread = await downloads.file(reading(given[1]))  # opened, and sent later
        if trained_between:
            direct.read(direct.gradient(2))
            direct.read(direct.call("optim_step", 3))
        direct.read(direct.call("save_for_sampler", 4 if trained_between else 2, path="one", overwrite=True))
        assert b"".join([part async for part in unread.body_iterator]) == before[1][1]
        for file in direct.models.checkpoints.locate(uri).iterdir():
            os.utime(file, (2**30, 2**30))  # written at another time, as a slow machine would
        after = [await answered(downloads, address) for address in given]
        if not trained_between:
            assert after == before
            return
        assert all(status == 404 and b"was overwritten after it was given" in body for status, body in after)
        new = [await answered(downloads, address) for address in addresses()]
        assert [status for status, _ in new] == [200, 200, 200]
        assert new[1][1] != before[1][1]
        assert new[1][1] in new[2][1]

    asyncio.run(read())


def test_an_address_expires(direct: Any) -> None:
    """It is good until its last second, and no longer."""
    now = [1000.0]
    direct.read(direct.call("save_external", 1, path="out"))
    downloads = Downloads(direct.models.checkpoints, Listings(direct.models, direct.journal), 60, lambda: now[0])
    uri = "tinker://sess:train:0/external_weights/out"
    call: Any = Asked()
    expires = downloads._expiry()
    version = downloads._version(uri)
    request = reading(downloads._signed(call, uri, "adapter_config.json", expires, version))
    now[0] = 1060.0
    assert downloads._verified(request) == (uri, "adapter_config.json", version)
    now[0] = 1060.1
    with pytest.raises(NotFoundError, match="expired"):
        downloads._verified(request)


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
