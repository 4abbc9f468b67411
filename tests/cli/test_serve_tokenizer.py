"""What clients are told to load a tokenizer by: never a folder of the server, unless its operator says so."""

from __future__ import annotations

import socket
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import pytest
from pretrained.folders import chat_folder
from servers import new_model

from pullback.cli.serve import add_parser, load_base
from pullback.service import ServedModels, serving

pytest.importorskip("transformers", reason="needs transformers and peft (extra hf)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_folder(tmp_path_factory.mktemp("models") / "chat")


def base_of(*words: str) -> Any:
    parser = ArgumentParser()
    add_parser(parser.add_subparsers())
    return load_base(parser.parse_args(["serve", "--device", "cpu", *words]))


@pytest.mark.parametrize("given", [None, "org/model", "/home/me/tokenizer"])
def test_clients_are_told_what_the_operator_says(folder: Path, tmp_path: Path, web: Any, given: str | None) -> None:
    """Nothing by default; the server itself loads the tokenizer from its folder in any case."""
    base = base_of("--model", str(folder), "--name", "tiny", *(() if given is None else ("--tokenizer", given)))
    assert base.tokenizer().decode(base.tokenizer().encode("Hello.")) == "Hello."
    with serving(ServedModels(base, tmp_path)) as url:
        http = web(url)
        _, model = new_model(http)
        info = http.post("get_info", json={"model_id": model["model_id"]})
    assert info.json()["model_data"]["tokenizer_id"] == given
    assert str(folder) not in info.text


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    """It has none to tell of, and says so where strings need one."""
    base = base_of("--model", "tiny")
    assert base.tokenizer_id is base.tokenizer_folder is None
    with pytest.raises(ValueError, match="give stop as token ids"):
        base.tokenizer()


def test_a_tokenizer_that_only_clients_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub is asked for it: every operation of the service would wait for the answer."""
    asked: list[object] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *given, **options: asked.append(given))
    base = base_of("--model", "tiny", "--tokenizer", "nobody/has-this-one")
    with pytest.raises(ValueError, match=r"\(nobody/has-this-one is not on its disk\): give stop as token ids"):
        base.tokenizer()
    assert not asked
