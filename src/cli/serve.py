"""``pullback serve``: the Tinker protocol over a model on this machine."""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import socket
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from ..backends.native.distributed.environment import process_count
from ..backends.native.distributed.ranks import find_mesh, require_timeout
from ..errors import ConfigError
from ..losses import loss_names
from ..service.distributed.follow import follow
from ..service.distributed.lead import leading
from ..service.distributed.member import Member, spread
from ..service.durability.checkpoints import Checkpoints
from ..service.durability.journal import Journal
from ..service.durability.recovery import adopt
from ..service.durability.storage import lock_folder
from ..service.http.server import require_keys, serve_forever
from ..service.limits import Keys, Limits, digest_of
from ..service.served.registry import Base, ServedModels
from .arguments.addresses import bound, listen, port_of
from .arguments.loss_modules import import_losses
from .arguments.models import DEVICE_HELP, MODEL_HELP, default_device, load_named
from .arguments.parser import DTYPES

__all__ = ["add_parser", "load_base"]

_KEYS = "PULLBACK_API_KEYS"
_TOKENIZERS = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
_EVERYBODY = "everybody"
_PER_KEY = {
    "queue": "operations that wait or run",
    "models": "models in memory",
    "samplers": "sampling sessions in memory",
    "losses": "custom losses in memory",
    "disk": "bytes of checkpoints",
}
_LEAST = {
    "token_budget": 1,
    "save_seconds": 0,
    "max_models": 1,
    "answer_bytes": 1,
    **{f"{name}_per_key": 1 for name in _PER_KEY},
}


def add_parser(commands: Any) -> None:
    """Add the command to a parser."""
    serve = commands.add_parser("serve", help="serve a model to clients of the Tinker training API")
    _add_model(serve)
    _add_access(serve)
    _add_limits(serve)
    serve.set_defaults(run=_run)


def _add_model(serve: Any) -> None:
    """Add the options of what is served."""
    serve.add_argument("--model", default="smollm2", help=MODEL_HELP)
    serve.add_argument("--name", help="the model's name for clients (default: the model as given)")
    serve.add_argument(
        "--tokenizer",
        help="what clients are told to load its tokenizer by: the id of a public repository, or a folder that they have "
        f"(default: {_TOKENIZERS['smollm2']} for smollm2, else nothing, and they try the name)",
    )
    serve.add_argument(
        "--import",
        dest="modules",
        action="append",
        default=[],
        metavar="MODULE",
        help="module to import before anything is served, found from the current folder too: clients can then name the losses "
        "that it registers; may be given several times",
    )
    serve.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="dtype of the base weights; adapters are fp32"
    )
    serve.add_argument("--device", help=DEVICE_HELP)


def _add_access(serve: Any) -> None:
    """Add the options of where it listens, and to whom."""
    serve.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; all but 127.0.0.1 and its like need API keys"
    )
    serve.add_argument("--port", type=int, default=8765, help="port to listen on; 0: any that is free")
    serve.add_argument(
        "--keys",
        type=Path,
        metavar="FILE",
        help=f"file of SHA-256 digests of API keys, a line each, see also --new-key; besides it the keys in ${_KEYS}, "
        "separated by commas",
    )
    serve.add_argument("--new-key", action="store_true", help="add a key to the file, print it once, and end")
    serve.add_argument(
        "--adopt",
        metavar="OWNER",
        help="give checkpoints that do not say whose they are to a key (its digest in the file of keys), or, where there "
        f"are no keys, to {_EVERYBODY!r}; and end",
    )


def _add_limits(serve: Any) -> None:
    """Add the options of what it may take, and what it keeps."""
    serve.add_argument("--checkpoints", default="checkpoints", help="folder of checkpoints and journal")
    serve.add_argument(
        "--max-models", type=int, default=Limits().models, metavar="N", help="models in memory, of all clients together"
    )
    serve.add_argument(
        "--answer-bytes",
        type=int,
        default=Limits().answer_bytes,
        metavar="N",
        help="bytes of answers that the journal keeps for clients to ask for again; beyond it the oldest go",
    )
    for name, what in _PER_KEY.items():
        serve.add_argument(f"--{name}-per-key", type=int, metavar="N", help=f"one key's {what} (default: a fair share)")
    serve.add_argument(
        "--token-budget",
        type=int,
        default=4096,
        metavar="N",
        help="tokens of one forward, padding included; memory depends on it, results do not",
    )
    serve.add_argument(
        "--timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="under torchrun: how long a process waits for the others",
    )
    serve.add_argument(
        "--save-seconds",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="when the server ends, save the models in memory as checkpoints, in so many seconds at most; 0: let them go",
    )


def _run(arguments: argparse.Namespace) -> int:
    if arguments.new_key or arguments.adopt is not None:
        return 0 if _follows() else _administer(arguments)
    _require_numbers(arguments)
    plain = [key.strip() for key in os.environ.get(_KEYS, "").split(",") if key.strip()]
    keys = Keys([*map(digest_of, plain), *_saved_keys(arguments.keys)])
    require_keys(arguments.host, keys)
    loss_names()  # a package or module of losses that cannot be loaded is said before anything is served
    for module, names in import_losses(arguments.modules).items():
        if not _follows():
            print(f"losses of {module}: {', '.join(names)}")
    with _address(arguments) as sockets:
        _load_and_serve(arguments, keys, sockets)
    return 0


def _require_numbers(arguments: argparse.Namespace) -> None:
    """Check what would otherwise be found when the model is loaded, the first adapter is made, or the server has ended.

    Raises:
        ConfigError: numbers are out of range; all of them are named.
    """
    given = {name: getattr(arguments, name) for name in _LEAST}
    problems = [
        f"--{name.replace('_', '-')} must be at least {_LEAST[name]}, got {value:g}"
        for name, value in given.items()
        if value is not None and not value >= _LEAST[name]
    ]
    try:
        require_timeout(arguments.timeout, "--timeout")
    except ConfigError as error:
        problems.append(str(error))
    if problems:
        raise ConfigError("; ".join(problems))


def _saved_keys(file: Path | None) -> list[str]:
    """Return the lines of the file of keys.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return file.read_text().splitlines() if file is not None else []
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"cannot read --keys {file}: {reason}; pullback serve --keys {file} --new-key makes a file with one key"
        ) from error


def _address(arguments: argparse.Namespace) -> AbstractContextManager[list[socket.socket]]:
    """Bind the address, in the first of several processes only."""
    return nullcontext([]) if _follows() else bound(arguments.host, arguments.port)


def _follows() -> bool:
    """Whether this is another than the first of several processes, which speaks, writes and listens for all."""
    return process_count() > 1 and int(os.environ["RANK"]) > 0


def _load_and_serve(arguments: argparse.Namespace, keys: Keys, sockets: list[socket.socket]) -> None:
    base, root = load_base(arguments), Path(arguments.checkpoints)
    mesh = find_mesh("auto", torch.device(arguments.device or default_device()), arguments.timeout)
    if mesh is None:
        _serve(ServedModels(base, root), keys, arguments, sockets)
        return
    member = Member(ServedModels(spread(base, mesh, arguments.timeout), root), mesh, arguments.timeout)
    if member.first:
        signal.signal(signal.SIGTERM, _end)
        with leading(member) as models:
            _serve(models, keys, arguments, sockets)
    else:
        follow(member)
    torch.distributed.destroy_process_group()


def _at_the_end(seconds: float | None) -> str:
    """Say what will become of the models in memory."""
    if seconds is None:
        return "models in memory are lost when this server ends (--save-seconds 0): clients should save what they need"
    return f"models in memory are saved as checkpoints when this server is asked to end, in {seconds:g} s at most"


def _administer(arguments: argparse.Namespace) -> int:
    """Do what needs no model, and end."""
    if arguments.new_key:
        return _new_key(arguments.keys)
    return _adopt(Path(arguments.checkpoints), arguments.adopt)


def _adopt(folder: Path, owner: str) -> int:
    if owner != _EVERYBODY:
        Keys([owner])  # refuses what is no digest
    whose = "" if owner == _EVERYBODY else owner.strip().lower()[:32]
    lock = lock_folder(folder)
    try:
        journal = Journal(folder / "journal.sqlite")
        taken = adopt(Checkpoints(folder), journal, whose)
        journal.close()
    finally:
        lock.close()
    print("\n".join(taken) or "every checkpoint says whose it is")
    return 0


def _end(number: int, _: object) -> None:
    """End as the signal wants it, but through what lets the other processes end."""
    raise SystemExit(128 + number)


def _serve(models: ServedModels, keys: Keys, arguments: argparse.Namespace, sockets: list[socket.socket]) -> None:
    quotas = {f"{name}_per_key": getattr(arguments, f"{name}_per_key") for name in _PER_KEY}
    limits = Limits(models=arguments.max_models, answer_bytes=arguments.answer_bytes, **quotas)
    saved_for = arguments.save_seconds if arguments.save_seconds > 0 else None
    port = port_of(sockets)

    def announce() -> None:
        listen(sockets)
        host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
        print(f"{models.base.name} on http://{host}:{port}", "" if keys else "(no keys: everybody is let in)")
        print(_at_the_end(saved_for), flush=True)

    serve_forever(models, arguments.host, port, keys, limits, save_seconds=saved_for, sockets=sockets, ready=announce)


def _new_key(file: Path | None) -> int:
    if file is None:
        raise ConfigError("--new-key needs --keys FILE, which the key's digest is added to")
    key = f"tml-{secrets.token_urlsafe(32)}"
    with file.open("a") as opened:
        opened.write(digest_of(key) + "\n")
    print(key)
    return 0


def load_base(arguments: argparse.Namespace) -> Base:
    """Load the frozen model that all clients' adapters share.

    Raises:
        ConfigError: there is no such model.
    """
    loaded = load_named(arguments.model, dtype=arguments.dtype, device=arguments.device)
    return Base(
        arguments.name or arguments.model,
        loaded.model,
        getattr(arguments, "tokenizer", None) or _TOKENIZERS.get(arguments.model),
        {"token_budget": arguments.token_budget},
        tokenizer_folder=None if loaded.tokenizer is None else str(loaded.folder),
    )
