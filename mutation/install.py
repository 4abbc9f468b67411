"""Putting a mutant in place: its code object is given to the functions that live already; no file is written."""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import CodeType, FunctionType

from .sites import Mutant

__all__ = ["NotLoadedError", "install", "live_functions"]

Live = Mapping[tuple[str, str], list[FunctionType]]


class NotLoadedError(Exception):
    """No function with the code that a mutant changes has been loaded."""


def live_functions(paths: Collection[Path]) -> Live:
    """Return the functions that come from these files, by path and qualified name."""
    wanted = {str(path) for path in paths}
    real = functools.cache(os.path.realpath)
    gc.unfreeze()  # what the tests' own conftest has set aside is not listed
    found: dict[tuple[str, str], list[FunctionType]] = {}
    for thing in gc.get_objects():
        if type(thing) is FunctionType and (path := real(thing.__code__.co_filename)) in wanted:
            found.setdefault((path, thing.__code__.co_qualname), []).append(thing)
    return found


def install(mutant: Mutant, path: Path, source: str, live: Live) -> None:
    """Give the functions that a mutant changes its code, for the rest of this process.

    Args:
        mutant: the change.
        path: of the module, absolute and real.
        source: the module as it is.
        live: the functions of the module.

    Raises:
        NotLoadedError: none of them is loaded.
    """
    functions = live.get((str(path), mutant.function), [])
    if not functions:
        raise NotLoadedError(f"{mutant.function} of {path} is not loaded: do the tests import it?")
    for function in functions:
        old = function.__code__
        module = compile(mutant.source(source), old.co_filename, "exec", dont_inherit=True)
        same = (code for code in _codes(module) if code.co_qualname == old.co_qualname)
        function.__code__ = next(code for code in same if code.co_firstlineno == old.co_firstlineno)


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
