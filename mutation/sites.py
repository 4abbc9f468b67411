"""Mutants: every operator at every node inside the functions of a module."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import final

from .operators import OPERATORS, Scope

__all__ = ["Mutant", "mutants_of"]

_SKIPPED = (ast.Raise, ast.JoinedStr, ast.pattern, ast.Import, ast.ImportFrom)
_CONSTANTS = (
    "advantages",
    "anchor",
    "log_ratio",
    "ref_logprobs",
    "minus",
    "mask",
    "scale",
    "weights",
    "factors",
    "args",
)
_ATOMS = (ast.Name, ast.Call, ast.Attribute, ast.Subscript, ast.Constant, ast.Tuple)


@final
@dataclass(frozen=True)
class Mutant:
    """One change of one expression.

    Attributes:
        path: of the module.
        function: the outermost function around the change, with its class.
        operator: what was done.
        before, after: the expression, in canonical spelling.
        start, end: bytes of the source that are replaced.
        text: by what.
        lines: first and last line of the statement, of whose tests one should fail.
        occurrence: tells equal changes within a function apart.
    """

    path: str
    function: str
    operator: str
    before: str
    after: str
    start: int
    end: int
    text: str
    lines: tuple[int, int]
    occurrence: int = 0

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        """What stays when lines move."""
        return self.path, self.function, self.before, self.after, self.occurrence

    @property
    def change(self) -> str:
        """``before -> after``, numbered where the same change is made at a second place of the function."""
        return f"{self.before} -> {self.after}" + (f" ({self.occurrence + 1})" if self.occurrence else "")

    def source(self, original: str) -> str:
        """Return the changed source."""
        encoded = original.encode()
        return (encoded[: self.start] + self.text.encode() + encoded[self.end :]).decode()

    def diff(self, original: str) -> str:
        """Return the change as the lines of a diff, without its header."""
        lines = difflib.unified_diff(original.splitlines(), self.source(original).splitlines(), n=0, lineterm="")
        return "\n".join(list(lines)[3:])


def mutants_of(path: str, source: str, gradient_paths: Collection[str] = ()) -> list[Mutant]:
    """Return every mutant of a module.

    Only what runs inside a function is changed: no default, no annotation, no decorator, and no error that is raised.

    Args:
        path: of the module.
        source: its text.
        gradient_paths: the qualified names of the functions that a gradient flows through.
    """
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found: dict[tuple[int, int, str], Mutant] = {}
    for name, function in _functions(ast.parse(source)):
        tensors = _tensors(function) if name in gradient_paths else frozenset()
        for node, statement, parents in _nodes(function):
            for operator, replaced in _changes(node, Scope(parents, tensors)):
                text = _spelled(replaced, parents[-1])
                start = starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]
                end = starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]
                before, after = ast.unparse(node), ast.unparse(replaced)
                lines = _lines(statement)
                mutant = Mutant(path, name, operator, before, after, start, end, text, lines)
                found.setdefault((start, end, after), mutant)
    return _numbered(list(found.values()))


def _changes(node: ast.AST, scope: Scope) -> Iterator[tuple[str, ast.AST]]:
    for name, operator in OPERATORS.items():
        for replaced in operator(node, scope):
            yield name, ast.fix_missing_locations(replaced)


def _functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        if isinstance(node, ast.ClassDef):
            yield from ((f"{node.name}.{f.name}", f) for f in node.body if isinstance(f, ast.FunctionDef))


def _tensors(function: ast.FunctionDef) -> frozenset[str]:
    """Return the arguments that a gradient flows through, of a function that it flows through: no constants, by name."""
    arguments = {a.arg: ast.unparse(a.annotation) for a in function.args.args if a.annotation is not None}
    return frozenset(name for name, kind in arguments.items() if "Tensor" in kind and name not in _CONSTANTS) | {"self"}


def _nodes(function: ast.FunctionDef) -> Iterator[tuple[ast.AST, ast.stmt, tuple[ast.AST, ...]]]:
    """Yield what can be changed in a function: each node, its innermost statement, and the nodes around it."""

    def visit(
        node: ast.AST, statement: ast.stmt, parents: tuple[ast.AST, ...]
    ) -> Iterator[tuple[ast.AST, ast.stmt, tuple[ast.AST, ...]]]:
        if isinstance(node, _SKIPPED) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            return
        statement = node if isinstance(node, ast.stmt) else statement
        if hasattr(node, "lineno"):
            yield node, statement, parents
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "decorator_list", "args", "returns") and not isinstance(node, ast.Call):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from visit(child, statement, (*parents, node))

    for statement in function.body:
        yield from visit(statement, statement, (function,))


def _lines(statement: ast.stmt) -> tuple[int, int]:
    """Return the lines of a statement, of a compound one those of its head."""
    body = getattr(statement, "body", None) or getattr(statement, "cases", None)
    last = statement.end_lineno or statement.lineno
    if body:
        first = body[0].pattern if isinstance(body[0], ast.match_case) else body[0]
        last = max(statement.lineno, first.lineno - 1)
    return statement.lineno, last


def _spelled(node: ast.AST, parent: ast.AST) -> str:
    text = ast.unparse(node)
    alone = isinstance(node, (*_ATOMS, ast.stmt)) or isinstance(parent, ast.stmt)
    return text if alone else f"({text})"


def _numbered(mutants: list[Mutant]) -> list[Mutant]:
    seen: dict[tuple[str, ...], int] = {}
    numbered = []
    for m in sorted(mutants, key=lambda m: (m.start, m.end, m.after)):
        key = (m.path, m.function, m.before, m.after)
        seen[key] = seen.get(key, -1) + 1
        numbered.append(Mutant(**{**m.__dict__, "occurrence": seen[key]}))
    return numbered
