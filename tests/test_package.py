"""The package as a whole: what it imports, exports, and how its parts depend on each other."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import subprocess
import sys
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path

import pytest

import pullback
from pullback import errors
from pullback.backends import TorchBackend, TrainerBackend
from pullback.deprecation import moved
from pullback.losses import loss_names, registry

ROOT = Path(__file__).parent.parent
PACKAGE = Path(pullback.__file__).parent
MAY_IMPORT = {
    "__main__": {"cli"},
    "errors": {"deprecation"},
    "deprecation": set(),
    "losses": {"errors", "deprecation"},
    "ops": {"errors", "deprecation"},
    "datums": {"errors", "deprecation", "losses"},
    "backends": {"errors", "deprecation", "losses", "datums", "ops"},
    "testing": {"errors", "deprecation", "losses", "datums", "ops", "backends"},
    "pytest_plugin": set(),
    "service": {"errors", "deprecation", "losses", "datums", "ops", "backends"},
    "cli": {"errors", "deprecation", "losses", "datums", "ops", "backends", "testing", "service", "__version__"},
}


def run(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r}); {code}"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_import_is_light() -> None:
    """`import pullback` loads none of the optional libraries."""
    heavy = ("transformers", "peft", "tinker", "hypothesis", "matplotlib", "rich", "gguf")
    done = run(f"import pullback, pullback.testing; print([m for m in {heavy} if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    "name", ["pullback", "pullback.losses", "pullback.datums", "pullback.backends", "pullback.testing"]
)
def test_exports(name: str) -> None:
    """Every name of `__all__` exists, is listed once, and the list is sorted."""
    module = importlib.import_module(name)
    assert module.__all__ == sorted(set(module.__all__), key=lambda n: (not n.isupper(), not n[0].isupper(), n))
    assert all(hasattr(module, exported) for exported in module.__all__)


def imported_parts(source: str, part: str) -> set[str]:
    """The parts of the package that a module of ``part`` imports, from its relative imports."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            found.add((node.module or "").split(".")[0] if node.module else "")
    return {name for name in found if name in MAY_IMPORT and name != part}


def test_dependencies_point_one_way() -> None:
    """backends -> datums -> losses -> errors; testing and cli on top; a planted back edge is noticed."""
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part != "__init__":
            assert imported_parts(path.read_text(), part) <= MAY_IMPORT[part], path
    assert not imported_parts("from ..backends.types import Plan", "losses") <= MAY_IMPORT["losses"]


def imported_modules(name: str, source: str, known: Collection[str], *, is_package: bool) -> set[str]:
    """The modules among ``known`` that a module imports, by relative imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            parents = name.split(".")[: None if is_package else -1]
            home = [*parents[: len(parents) + 1 - node.level], *(node.module.split(".") if node.module else [])]
            named = {".".join([*home, alias.name]) for alias in node.names}
            found |= (named & set(known)) or ({".".join(home)} & set(known))
    return found - {name}


def circle(imports: Mapping[str, Collection[str]]) -> list[str]:
    """Modules that import each other in a circle; none: an empty list."""
    left = {name: set(others) for name, others in imports.items()}
    while leaves := [name for name, others in left.items() if not others & left.keys()]:
        for name in leaves:
            del left[name]
    path: list[str] = [next(iter(left))] if left else []
    while path and path.count(path[-1]) == 1:
        path.append(min(left[path[-1]] & left.keys()))
    return path[path.index(path[-1]) :] if path else []


def test_no_circle_of_imports() -> None:
    """Not even one for the type checker alone; a planted one is found."""
    sources = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    names = {name.removesuffix(".__init__"): path for name, path in sources.items()}
    imports = {
        name: imported_modules(name, path.read_text(), names, is_package=path.name == "__init__.py")
        for name, path in names.items()
    }
    assert sum(map(len, imports.values())) > len(imports)
    assert circle(imports) == []
    source = "if TYPE_CHECKING:\n    from ..b.c import d\n"
    planted = {
        "p.a.x": imported_modules("p.a.x", source, {"p.b.c"}, is_package=False),
        "p.b.c": {"p.a.x"},
        "p.e": {"p.b.c"},
    }
    assert set(circle(planted)) == {"p.a.x", "p.b.c"}


def test_an_old_name_is_found_with_a_warning() -> None:
    """A renamed name still works, says the new one, and an unknown one is an AttributeError as ever."""
    find = moved("pullback.somewhere", {"Old": ("errors", "ConfigError")})
    with pytest.warns(DeprecationWarning, match=r"pullback\.somewhere\.Old is now pullback\.errors\.ConfigError"):
        assert find("Old") is errors.ConfigError
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        find("Other")


def test_every_error_is_in_the_tree() -> None:
    """The docstring of errors.py shows every class; each has a stdlib parent."""
    found = [c for c in vars(errors).values() if inspect.isclass(c) and issubclass(c, errors.PullbackError)]
    assert len(found) > 20
    for error in found:
        assert error.__name__ in (errors.__doc__ or "")
        assert error.__doc__


def test_missing_extra_names_the_install() -> None:
    """Without an optional library the error says which extra brings it."""
    code = "sys.modules['tinker'] = None; from pullback.datums import to_tinker; to_tinker([])"
    assert "pip install 'pullback[remote]'" in run(code).stderr


@pytest.mark.parametrize("name", loss_names())
def test_losses_are_documented(name: str) -> None:
    """Each registered loss states its formula and its source."""
    loss = registry.get(name)
    assert "``" in (loss.__doc__ or "")
    assert loss.sources


def test_native_backend_has_the_protocol_verbs() -> None:
    """TorchBackend has every verb of the protocol, with its arguments in front."""
    for verb, method in inspect.getmembers(TrainerBackend, inspect.isfunction):
        if not verb.startswith("_"):
            wanted = list(inspect.signature(method).parameters)
            assert list(inspect.signature(getattr(TorchBackend, verb)).parameters)[: len(wanted)] == wanted, verb


@pytest.mark.skipif(not (ROOT / "src").is_dir(), reason="needs the source tree")
def test_packages_are_listed() -> None:
    """The wheel holds every sub-package: the explicit list equals the folders."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {
        ".".join(("pullback", *p.parent.relative_to(ROOT / "src").parts)) for p in (ROOT / "src").rglob("__init__.py")
    }
    # The plugin's folder is a package of its own, so that pytest can load it without this one.
    assert set(listed) == folders - {"pullback.pytest_plugin"} | {"pullback_pytest"}


@pytest.mark.slow  # two new processes; the commands themselves are tested in this one
def test_the_package_runs() -> None:
    """`python -m pullback` is the command line, and its exit status is the command's."""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    for arguments, status, text in ((["losses"], 0, "dpo"), (["no"], 2, "")):
        command = [sys.executable, "-m", "pullback", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == status, done.stderr
        assert text in done.stdout
