"""The files of a checkpoint: safetensors and a JSON manifest in one folder, which takes its place at once."""

from __future__ import annotations

import hashlib
import json
import os
import re
import reprlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ....errors import CheckpointError
from ...operations.normalization import Ledger

__all__ = [
    "FORMAT",
    "MANIFEST",
    "file_digest",
    "new_folder",
    "read_manifest",
    "read_tensors",
    "require_name",
    "require_there",
    "require_undamaged",
    "saved_ledger",
    "tensors_size",
    "unfinished",
    "write_tensors",
]

FORMAT: Final = 1
MANIFEST: Final = "manifest.json"
_LONGEST: Final = 255 - len("..") - 8  # characters: a file system's limit, less what `unfinished` adds
_METADATA: Final = {"format": "pt"}
_DTYPES: Final = {  # as safetensors spells those that are not of three characters
    torch.bfloat16: "BF16",
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def require_name(name: object) -> None:
    """Check the name of a checkpoint.

    Raises:
        CheckpointError: it is none, leaves the folder, or is longer than a file system takes.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise CheckpointError(
            f"checkpoint name {reprlib.repr(name)} must be letters (a-z, A-Z), digits, '.', '_' and '-' (no folders)"
        )
    if len(name) > _LONGEST:
        raise CheckpointError(
            f"checkpoint name {reprlib.repr(name)} has {len(name)} characters; {_LONGEST} at most are taken"
        )


def new_folder(root: Path, name: str, overwrite: bool) -> Path:
    """Return where a checkpoint is to lie.

    Raises:
        CheckpointError: the name is none, or is taken.
    """
    require_name(name)
    final = root / name
    if final.exists() and not overwrite:
        raise CheckpointError(f"checkpoint {final} exists; choose another name or pass overwrite=True")
    return final


@contextmanager
def unfinished(final: Path) -> Iterator[Path]:
    """Give a folder to write into, which then takes its place at once; after a failure nothing has changed."""
    final.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    try:
        yield folder
        for path in folder.iterdir():
            _sync(path)
        _replace(folder, final)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def write_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write copies of tensors, which may share memory, as safetensors."""
    copied = {n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}
    save_file(copied, file, _METADATA)


def tensors_size(tensors: Mapping[str, Tensor]) -> int:
    """Return the size of the file that `write_tensors` would write, bytes; with several dtypes, within 8 bytes a tensor."""
    header: dict[str, Any] = {"__metadata__": _METADATA}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        begin, end = end, end + tensor.numel() * tensor.element_size()
        described = {
            "dtype": _DTYPES.get(tensor.dtype, "F32"),
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        header[name] = described
    written = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-written // 8) * 8 + end


def _replace(folder: Path, final: Path) -> None:
    """Move the finished folder into place; an old one is moved aside first, so a crash leaves one or the other."""
    old = final.with_name(f".{final.name}.old")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(final, old)
    os.rename(folder, final)
    shutil.rmtree(old, ignore_errors=True)
    _sync(final.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{folder} is no checkpoint: it has no {MANIFEST}") from error
    except ValueError as error:  # no JSON, or no text
        raise CheckpointError(f"{folder / MANIFEST} is damaged: {error}") from error
    if not isinstance(manifest, dict):
        raise CheckpointError(f"{folder / MANIFEST} is damaged: it holds a {type(manifest).__name__}, not a mapping")
    missing = sorted({"files", "frozen", "weights_version"} - set(manifest))
    if manifest.get("format") == FORMAT and missing:
        raise CheckpointError(f"{folder / MANIFEST} is damaged: it lacks {', '.join(missing)}")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{folder} has format {manifest.get('format')!r}; this version reads {FORMAT}")
    return manifest


def saved_ledger(folder: Path, manifest: Mapping[str, Any]) -> Ledger:
    try:
        return Ledger.from_json(manifest["window"], int(manifest["operations"]))
    except (KeyError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{folder / MANIFEST} is damaged: its accumulation cannot be read ({what})") from error


def read_tensors(folder: Path, file: str, manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    require_there(folder, file, manifest)
    require_undamaged(folder, file, manifest)
    return dict(load_file(folder / file))


def require_there(folder: Path, file: str, manifest: Mapping[str, Any]) -> None:
    if file not in manifest["files"] or not (folder / file).exists():
        raise CheckpointError(f"{folder} lacks {file}: it belongs to another kind of model, or is incomplete")


def require_undamaged(folder: Path, file: str, manifest: Mapping[str, Any]) -> None:
    if file_digest(folder / file) != manifest["files"][file]:
        raise CheckpointError(f"{folder / file} is damaged: its digest is not the one in {MANIFEST}")
