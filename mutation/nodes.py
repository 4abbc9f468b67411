"""Reading syntax trees: what a node calls, computes or names."""

from __future__ import annotations

import ast

__all__ = ["arithmetic", "calls", "function", "is_none", "is_text", "last_name", "method", "receiver", "renamed"]


def method(node: ast.AST, *names: str) -> ast.Call | None:
    """Return the node if it calls a method, or a function of a module, with one of these names."""
    known = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in names
    return node if known else None  # type: ignore[return-value]  # known to be a call


def function(node: ast.AST, *names: str) -> ast.Call | None:
    """Return the node if it calls a function by its bare name, one of these."""
    known = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names
    return node if known else None  # type: ignore[return-value]  # known to be a call


def receiver(call: ast.Call) -> ast.expr:
    """Return what a method is called on."""
    assert isinstance(call.func, ast.Attribute)
    return call.func.value


def calls(value: ast.expr, name: str, *args: ast.expr, **keywords: ast.expr) -> ast.Call:
    """Return ``value.name(*args, **keywords)``."""
    return ast.Call(ast.Attribute(value, name), list(args), [ast.keyword(k, v) for k, v in keywords.items()])


def renamed(call: ast.Call, name: str) -> ast.Call:
    """Return the call of another method of the same receiver."""
    return ast.Call(ast.Attribute(receiver(call), name), call.args, call.keywords)


def last_name(node: ast.AST) -> str:
    """Return the last part of a dotted name or of a called one, without leading underscores; empty for anything else."""
    if isinstance(node, ast.Call):
        return last_name(node.func)
    name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
    return name.lstrip("_")


def is_text(node: ast.AST) -> bool:
    """Return whether a node is a string, or a tuple: its sums are no arithmetic."""
    return isinstance(node, ast.JoinedStr | ast.Tuple) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def is_none(node: ast.AST) -> bool:
    """Return whether a node is the literal None."""
    return isinstance(node, ast.Constant) and node.value is None


def arithmetic(node: ast.AST, *kinds: type[ast.operator]) -> ast.BinOp | None:
    """Return the node if it is a binary operation of these kinds on numbers."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, kinds) and not (is_text(node.left) or is_text(node.right)):
        return node
    return None
