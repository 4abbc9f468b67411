"""Checkpoint URIs and the folders behind them: ``tinker://<model id>/<kind>/<name>``."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, final

from ...backends.native.checkpoints.files import MANIFEST, require_name
from ...errors import CheckpointError
from .descriptions import Description

__all__ = ["SCHEME", "Checkpoints"]

SCHEME: Final = "tinker://"
_PART: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,244}")  # longer ones could not be saved, nor looked for
_EXPORTED: Final = "external_weights"
_KINDS: Final = ("weights", "sampler_weights", _EXPORTED)
_MODEL: Final = re.compile(r"_train_(\d+)$")  # the end of a model's folder
_ASIDE: Final = ".old"  # what a checkpoint is called while another takes its name


@final
class Checkpoints:
    """Where checkpoints lie.

    Args:
        root: ``root / model id / kind / name``.
        clock: seconds of the epoch.

    Attributes:
        changing: held by whoever puts a checkpoint in its place and notes it, or deletes what the journal says.
    """

    def __init__(self, root: Path, clock: Callable[[], float] = time.time) -> None:
        self.root, self.clock = root, clock
        self.changing = threading.Lock()

    def uri(self, model: str, kind: str, name: str) -> str:
        """Return the URI of a checkpoint.

        Raises:
            CheckpointError: the name is none, or longer than a file system takes.
        """
        require_name(name)
        return f"{SCHEME}{model}/{kind}/{name}"

    def folder(self, model: str, kind: str) -> Path:
        """Where a model's checkpoints of one kind lie."""
        return self.root / model.replace(":", "_") / kind

    @staticmethod
    def parts(uri: str) -> tuple[str, str, str]:
        """Return model id, kind and name.

        Raises:
            CheckpointError: it is no such URI, or leads elsewhere.
        """
        parts = uri.removeprefix(SCHEME).split("/") if isinstance(uri, str) else []
        known = uri.startswith(SCHEME) if isinstance(uri, str) else False
        if not known or len(parts) != 3 or parts[1] not in _KINDS or not all(map(_PART.fullmatch, parts)):
            raise CheckpointError(
                f"{uri!r} is no checkpoint of this server: {SCHEME}<model id>/weights/<name> was expected"
            )
        return parts[0], parts[1], parts[2]

    def place(self, uri: str) -> Path:
        """Return the folder of a checkpoint, whether its time to live has passed or not.

        Raises:
            CheckpointError: there is none.
        """
        model, kind, name = self.parts(uri)
        path = self.folder(model, kind) / name
        if not path.is_dir():
            raise self._missing(uri)
        return path

    @staticmethod
    def _missing(uri: str) -> CheckpointError:
        return CheckpointError(
            f"there is no checkpoint {uri}; it may have been deleted, or its time to live has passed"
        )

    def loadable(self, uri: str) -> Path:
        """Return the folder of a checkpoint that weights can be loaded from.

        Raises:
            CheckpointError: there is none, or it was exported, which is for download.
        """
        path = self.locate(uri)
        if self.parts(uri)[1] == _EXPORTED:
            raise CheckpointError(f"{uri} was exported for download; load a checkpoint that save_state has written")
        return path

    def locate(self, uri: str) -> Path:
        """Return the folder of a checkpoint that may be loaded.

        Raises:
            CheckpointError: there is none, or its time to live has passed.
        """
        path = self.place(uri)
        description = Description.read(path)
        if description is not None and description.expires is not None and description.expires <= self.clock():
            moment = datetime.fromtimestamp(description.expires, UTC).isoformat(timespec="seconds")
            raise CheckpointError(f"the time to live of {uri} ended at {moment}: it cannot be loaded any more")
        return path

    def all(self) -> Iterator[tuple[str, Path]]:
        """All checkpoints on the disk: the URI of each, as far as its folders tell, and its folder."""
        for kind in _KINDS:
            for path in sorted(self.root.glob(f"*/{kind}/[!.]*")):
                description = Description.read(path)
                model = _MODEL.sub(r":train:\1", path.parent.parent.name) if description is None else description.model
                if (path / MANIFEST).is_file() and self.folder(model, kind) == path.parent:
                    yield self.uri(model, kind, path.name), path

    def size(self, uri: str) -> int:
        """Bytes of a checkpoint."""
        return sum(file.stat().st_size for file in self.place(uri).iterdir())

    def fingerprint(self, uri: str) -> str:
        """Digest of a checkpoint's manifest, which names the digests of its files; empty if there is no checkpoint."""
        try:
            return hashlib.sha256((self.place(uri) / MANIFEST).read_bytes()).hexdigest()
        except (CheckpointError, FileNotFoundError):
            return ""

    def delete(self, uri: str) -> None:
        """Remove a checkpoint, at once and as a whole."""
        path = self.place(uri)
        gone = Path(tempfile.mkdtemp(prefix=".", suffix=".gone", dir=path.parent))
        try:
            os.rename(path, gone)  # over the empty one
        except FileNotFoundError:  # another thread was first
            gone.rmdir()
            raise self._missing(uri) from None
        shutil.rmtree(gone)

    def tidy(self) -> None:
        """Clear up what a killed server left half done: a checkpoint moved aside comes back, anything else goes."""
        for path in [p for kind in _KINDS for p in self.root.glob(f"*/{kind}/.*")]:
            whole = path.with_name(path.name[1:].removesuffix(_ASIDE))
            if path.name.endswith(_ASIDE) and not whole.exists():
                os.rename(path, whole)
            else:
                shutil.rmtree(path, ignore_errors=True)
