"""`pullback serve` takes the models that the other commands take."""

from __future__ import annotations

import re
import socket
import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import closing
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from pullback import AdamParams, Datum, ModelInput, connect
from pullback.cli import main, serve
from pullback.cli.arguments.addresses import bound, listen, port_of
from pullback.cli.arguments.models import load_named
from pullback.cli.serve import load_base
from pullback.errors import ConfigError
from pullback.losses import Registry, registry
from pullback.losses.registry import ENTRY_POINT_GROUP
from pullback.service import ServedModels, serving
from pullback.service.durability.storage import lock_folder
from pullback.service.limits import Keys, Limits
from pullback.testing import random_llama

pytest.importorskip("transformers", reason="needs transformers and peft (extra hf)")
pytest.importorskip("tinker", reason="needs the official SDK (extra remote)")
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


QUOTAS = [f"{what}-per-key" for what in ("queue", "models", "samplers", "losses", "disk")]


def given(model: str) -> Namespace:
    return Namespace(model=model, name=None, device="cpu", dtype="float32", token_budget=64)


def test_tiny_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model without a tokenizer trains."""
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    base = load_base(given("tiny"))
    assert (base.name, base.tokenizer_id) == ("tiny", None)
    data = [Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3], "weights": [1.0, 1.0]})]
    with serving(ServedModels(base, tmp_path)) as url, connect(url, base_model="tiny", rank=2) as backend:
        backend.forward_backward(data, "cross_entropy").result()
        assert backend.optim_step(AdamParams()).result().metrics["grad_norm"] > 0


def test_a_folder_is_a_model_and_other_words_are_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same names in every command; a misspelt one is refused with the names that are known."""
    random_llama().save_pretrained(tmp_path / "model")
    assert load_named(str(tmp_path / "model"), device="cpu").folder == tmp_path / "model"
    assert load_named("tiny").folder is None
    with pytest.raises(ConfigError, match=r"smollm2, tiny .* or a folder"):
        load_base(given("tinny"))
    with pytest.raises(ConfigError, match="dtype must name"):
        load_named("tiny", dtype="floaty")
    assert main(["serve", "--model", "tinny", "--port", "0"]) == 2
    printed = capsys.readouterr()
    assert "got 'tinny'" in printed.err
    assert printed.out == ""


def test_quotas_are_given_by_flags(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each quota of a key has a flag; what is not given is a fair share, and what is no count is refused."""
    served: list[Limits] = []
    monkeypatch.setattr(serve, "serve_forever", lambda *given, **options: served.append(given[4]))
    command = ["serve", "--model", "tiny", "--checkpoints", str(tmp_path), "--port", "0"]
    assert main([*command, "--models-per-key", "3", "--disk-per-key", "1000000"]) == 0
    assert served == [Limits(models_per_key=3, disk_per_key=1_000_000)]
    assert main(command) == 0
    assert served[1] == Limits()
    assert main([*command, "--queue-per-key", "0"]) == 2
    assert len(served) == 2


def test_keys_of_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Separated by commas, with white space or without; each lets its owner in."""
    let_in: list[Keys] = []
    monkeypatch.setattr(serve, "serve_forever", lambda *given, **options: let_in.append(given[3]))
    monkeypatch.setenv("PULLBACK_API_KEYS", "tml-one, tml-two,\n,")
    assert main(["serve", "--model", "tiny", "--checkpoints", str(tmp_path), "--port", "0"]) == 0
    (keys,) = let_in
    assert len(keys) == 2
    assert None not in (keys.owner("tml-one"), keys.owner("tml-two"))


def fails_to_load(arguments: Namespace) -> Any:
    raise AssertionError("nothing is loaded before the address is known to be free")


def test_a_port_that_is_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is refused before a model is loaded, with what to do; nothing is said to be served."""
    monkeypatch.setattr(serve, "load_base", fails_to_load)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["serve", "--model", "tiny", "--port", str(port), "--checkpoints", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert f"port {port} is taken: give --port" in printed.err
    assert printed.out == ""


@pytest.mark.parametrize(
    ("address", "words"),
    [
        (["--port", "70000"], "--port must be a number from 0 (any that is free) to 65535, got 70000"),
        (["--port", "-1"], "--port must be a number from 0 (any that is free) to 65535, got -1"),
        (["--host", "999.1.1.1"], "999.1.1.1 can be reached from other machines"),
        (["--token-budget", "0"], "--token-budget must be at least 1, got 0"),
        (["--save-seconds", "-1"], "--save-seconds must be at least 0, got -1"),
        (["--save-seconds", "nan"], "--save-seconds must be at least 0, got nan"),
        (["--max-models", "0"], "--max-models must be at least 1, got 0"),
        (["--answer-bytes", "0"], "--answer-bytes must be at least 1, got 0"),
        *((["--" + each, "0"], f"--{each} must be at least 1, got 0") for each in QUOTAS),
        (
            ["--answer-bytes", "-5", "--disk-per-key", "0", "--timeout", "0"],
            "--answer-bytes must be at least 1, got -5; --disk-per-key must be at least 1, got 0; --timeout must be seconds",
        ),
        (["--timeout", "0"], "--timeout must be seconds above 0, 315360000 at most, got 0"),
        (["--timeout", "nan"], "--timeout must be seconds above 0, 315360000 at most, got nan"),
        (["--timeout", "inf"], "--timeout must be seconds above 0, 315360000 at most, got inf"),
    ],
)
def test_what_cannot_be_served(
    address: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An address that is none or needs keys, and numbers that are none, are refused before a model is loaded."""
    monkeypatch.setattr(serve, "load_base", fails_to_load)
    assert main(["serve", "--model", "tiny", *address]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("count", ["abc", "2"])
def test_processes_that_cannot_be_found(
    count: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are refused before a model is loaded, in words of the command."""
    monkeypatch.setattr(serve, "load_base", fails_to_load)
    monkeypatch.setenv("WORLD_SIZE", count)
    assert main(["serve", "--model", "tiny", "--port", "0"]) == 2
    printed = capsys.readouterr()
    assert "the other processes cannot be found" in printed.err
    assert "start this with torchrun" in printed.err
    assert printed.out == ""


@pytest.fixture(params=["0", "1"])
def first(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether this is the first of two processes that torchrun has started, or the other one."""
    set_by_torchrun = {"WORLD_SIZE": "2", "RANK": request.param, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in set_by_torchrun.items():
        monkeypatch.setenv(name, value)
    return bool(request.param == "0")


def test_keys_are_made_by_the_first_of_several_processes(
    first: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All that torchrun has started run the command: one key is added to the file, and printed once."""
    file = tmp_path / "keys"
    assert main(["serve", "--keys", str(file), "--new-key"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == first
    assert file.exists() == first


def test_checkpoints_are_adopted_by_the_first_of_several_processes(
    first: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others do not ask for the folder, which one process holds at a time."""
    folder = tmp_path / "checkpoints"
    assert main(["serve", "--checkpoints", str(folder), "--adopt", "everybody"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == folder.exists() == first


def test_what_is_missing_is_said_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file of keys that is not there, with what makes one; a package of losses that cannot be loaded."""
    monkeypatch.setattr(serve, "load_base", fails_to_load)
    missing = tmp_path / "keys.txt"
    assert main(["serve", "--model", "tiny", "--keys", str(missing)]) == 2
    printed = capsys.readouterr()
    assert (
        f"cannot read --keys {missing}: No such file or directory; pullback serve --keys {missing} --new-key"
        in printed.err
    )
    broken = EntryPoint("broken", "no_such_module:Loss", ENTRY_POINT_GROUP)
    monkeypatch.setattr(sys.modules[Registry.__module__], "entry_points", lambda group: [broken])
    monkeypatch.setattr(registry, "_group", ENTRY_POINT_GROUP)
    assert main(["serve", "--model", "tiny"]) == 2
    printed = capsys.readouterr()
    assert "the entry point 'broken'" in printed.err
    assert printed.out == ""


def test_hosts_of_other_machines() -> None:
    """Neither a name that nothing has, nor an address of somebody else (192.0.2.1 is one of documentation)."""
    for host in ("no..name", "192.0.2.1"):
        with (
            pytest.raises(ConfigError, match=f"--host must be an address of this machine.*got '{host}'"),
            bound(host, 0),
        ):
            pass
    with bound("localhost", 0) as sockets:
        listen(sockets)
        with pytest.raises(ConfigError, match="is taken"), bound("localhost", port_of(sockets)):
            pass


def test_a_folder_that_another_server_uses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is refused, and nothing is said to be served."""
    with closing(lock_folder(tmp_path)):
        assert main(["serve", "--model", "tiny", "--port", "0", "--checkpoints", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert f"another server uses {tmp_path}" in printed.err
    assert printed.out == ""


def test_what_is_printed_can_be_reached(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The address is printed when clients can connect to it, with the port that was found."""
    reached: list[int] = []

    def serve_forever(*given: Any, ready: Callable[[], None], **options: Any) -> None:
        assert capsys.readouterr().out == ""
        ready()
        place = re.search(r"tiny on http://127.0.0.1:(\d+)", capsys.readouterr().out)
        assert place
        with socket.create_connection(("127.0.0.1", int(place[1])), timeout=5):
            reached.append(int(place[1]))
        assert [port_of([each]) for each in options["sockets"]] == reached

    monkeypatch.setattr(serve, "serve_forever", serve_forever)
    assert main(["serve", "--model", "tiny", "--port", "0", "--checkpoints", str(tmp_path)]) == 0
    assert reached


def test_an_interrupted_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C, which the server raises again when it has saved and ended, is one line and a shell's exit status."""

    def serve_forever(*given: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(serve, "serve_forever", serve_forever)
    assert main(["serve", "--model", "tiny", "--port", "0", "--checkpoints", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "pullback: interrupted\n"
