"""Errors of a checkpoint's files as clients may read them: they name its URI, and no folder of the server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...errors import CheckpointError, PullbackError

__all__ = ["naming"]


@contextmanager
def naming(uri: str, folder: Path) -> Iterator[None]:
    """Let errors of a checkpoint's files name its URI instead of its folder.

    Raises:
        CheckpointError: for every error of ours that names the folder.
        OSError: of the disk, without the file's name.
    """
    try:
        yield
    except PullbackError as error:  # first: a CheckpointError is an OSError too
        text = str(error).replace(str(folder), uri).replace(str(folder.parent), uri.rpartition("/")[0])
        if text == str(error):
            raise
        raise CheckpointError(text) from error
    except OSError as error:
        if error.filename is None:
            raise
        raise type(error)(error.errno, error.strerror) from error
