"""Exports that only their recipients can read, by age (package ``pyrage`` of the extra ``serve``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from ...errors import ConfigError, require_extra

__all__ = ["encrypt_files", "encrypted_size", "recipients_of"]

_MOST: Final = 10
_SUFFIX: Final = ".age"
_FILES: Final = 3  # of an adapter, at most
_HEADER, _PER_RECIPIENT = 256, 1024  # bytes at most; an SSH key of 4,096 bits takes 750
_CHUNK, _TAG = 1 << 16, 16  # age's


def recipients_of(given: Any) -> list[Any]:
    """Read ``age_encryption_recipients``: age's own public keys, or SSH's; none where nothing is given.

    Raises:
        ConfigError: they are no such keys, or too many.
        MissingExtraError: this server cannot encrypt.
    """
    if given is None:
        return []
    if not isinstance(given, list) or not 1 <= len(given) <= _MOST or not all(isinstance(key, str) for key in given):
        raise ConfigError(f"age_encryption_recipients must be a list of 1 to {_MOST} public keys, got {given!r}")
    pyrage = require_extra("pyrage", "serve", "age_encryption_recipients")
    try:
        return [(pyrage.ssh if key.startswith("ssh-") else pyrage.x25519).Recipient.from_str(key) for key in given]
    except pyrage.RecipientError as error:
        raise ConfigError(f"age_encryption_recipients holds what is no public key of age or SSH: {error}") from error


def encrypted_size(size: int, recipients: Sequence[Any]) -> int:
    """Return how many bytes an adapter's files take when they are encrypted, at most.

    Args:
        size: of all of them in the clear, bytes.
        recipients: for whom; if there are none, they stay in the clear.
    """
    if not recipients:
        return size
    headers = _FILES * (_HEADER + _PER_RECIPIENT * len(recipients))
    return size + headers + _TAG * (size // _CHUNK + _FILES)


def encrypt_files(files: Sequence[Path], recipients: Sequence[Any]) -> None:
    """Replace files by encrypted ones, ``.age`` behind their names."""
    pyrage = require_extra("pyrage", "serve", "age_encryption_recipients")
    for file in files:
        pyrage.encrypt_file(str(file), f"{file}{_SUFFIX}", list(recipients))
        file.unlink()
