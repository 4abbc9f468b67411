"""Mutation operators: small changes that are bugs of this field, each a function from a node to what replaces it."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, final

from .nodes import arithmetic, calls, function, is_none, is_text, last_name, method, receiver, renamed

__all__ = ["OPERATORS", "Operator", "Scope"]


@final
@dataclass(frozen=True)
class Scope:
    """Where a node stands.

    Attributes:
        parents: the nodes around it, the innermost last.
        differentiable: the names of the tensors that a gradient flows through; empty outside of a gradient path.
    """

    parents: tuple[ast.AST, ...] = ()
    differentiable: frozenset[str] = frozenset()

    @property
    def parent(self) -> ast.AST | None:
        """The innermost node around it."""
        return self.parents[-1] if self.parents else None


Operator = Callable[[ast.AST, Scope], Iterator[ast.AST]]
OPERATORS: Final[dict[str, Operator]] = {}
WEIGHTS: Final = frozenset(
    {"weight", "weights", "scale", "factor", "coefficient", "mask", "averaged_over", "beta", "there"}
)
SYMMETRIC: Final = frozenset(
    {"maximum", "minimum", "max", "min", "logical_or", "logical_and", "where", "isinstance", "addcmul", "addcmul_"}
)
CHECKS: Final = frozenset({"choice", "number", "bound", "getattr", "__setattr__", "Problem", "remember"})


def operator(function: Operator) -> Operator:
    """Enter an operator under its name."""
    OPERATORS[function.__name__] = function
    return function


@operator
def flip_sign(node: ast.AST, scope: Scope) -> Iterator[ast.AST]:
    """``-x`` to ``x``, ``x.neg()`` to ``x``."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield node.operand
    if call := method(node, "neg", "neg_"):
        yield receiver(call)


@operator
def swap_plus_minus(node: ast.AST, scope: Scope) -> Iterator[ast.AST]:
    """``+`` and ``-``, also as methods and in assignments."""
    other: dict[type, ast.operator] = {ast.Add: ast.Sub(), ast.Sub: ast.Add()}
    if sum_ := arithmetic(node, ast.Add, ast.Sub):
        yield ast.BinOp(sum_.left, other[type(sum_.op)], sum_.right)
    if isinstance(node, ast.AugAssign) and type(node.op) in other:
        yield ast.AugAssign(node.target, other[type(node.op)], node.value)
    names = {"add": "sub", "add_": "sub_", "sub": "add", "sub_": "add_"}
    if call := method(node, *names):
        yield renamed(call, names[call.func.attr])  # type: ignore[attr-defined]  # a method


@operator
def swap_times_divide(node: ast.AST, scope: Scope) -> Iterator[ast.AST]:
    """``*`` and ``/``, also as methods."""
    other: dict[type, ast.operator] = {ast.Mult: ast.Div(), ast.Div: ast.Mult()}
    if product := arithmetic(node, ast.Mult, ast.Div):
        yield ast.BinOp(product.left, other[type(product.op)], product.right)
    names = {"mul": "div", "mul_": "div_", "div": "mul", "div_": "mul_"}
    if call := method(node, *names):
        yield renamed(call, names[call.func.attr])  # type: ignore[attr-defined]  # a method


@operator
def drop_term(node: ast.AST, scope: Scope) -> Iterator[ast.AST]:
    """One of the two terms of a sum, each in turn."""
    if sum_ := arithmetic(node, ast.Add, ast.Sub):
        yield sum_.left
        yield sum_.right if isinstance(sum_.op, ast.Add) else ast.UnaryOp(ast.USub(), sum_.right)
    if call := method(node, "add", "add_", "sub", "sub_", "addcmul", "addcmul_", "index_add"):
        yield receiver(call)


@operator
def shift_index(node: ast.AST, scope: Scope) -> Iterator[ast.AST]:
    """A constant index, or an end of a slice, by one."""
    if not isinstance(node, ast.Subscript) or not isinstance(node.ctx, ast.Load):
        return
    at = node.slice
    if isinstance(at, ast.Constant) and isinstance(at.value, int):
        yield ast.Subscript(node.value, ast.Constant(1 - at.value if at.value in (0, 1) else at.value + 1))
    if isinstance(at, ast.Slice):
        one = ast.Constant(1)
        yield ast.Subscript(
            node.value, ast.Slice(ast.BinOp(at.lower, ast.Add(), one) if at.lower else one, at.upper, at.step)
        )
        if at.upper:
            yield ast.Subscript(node.value, ast.Slice(at.lower, ast.BinOp(at.upper, ast.Sub(), one), at.step))


@operator
def remove_detach(node: ast.AST, scope: Scope) -> Iterator[ast.AST]:
    """``x.detach()`` and ``constant(x)`` to ``x``, ``no_grad`` to ``enable_grad``."""
    if call := method(node, "detach"):
        yield receiver(call)
    if call := function(node, "constant"):
        yield call.args[0]
    if call := method(node, "no_grad"):
        yield renamed(call, "enable_grad")


@operator
def add_detach(node: ast.AST, scope: Scope) -> Iterator[ast.AST]:
    """A detach where a gradient flows: on what is returned, and on a tensor that enters an operation."""
    parent = scope.parent
    if not scope.differentiable or not isinstance(node, ast.expr):
        return
    returned = isinstance(parent, ast.Return) and not isinstance(node, ast.Constant | ast.Tuple | ast.Name | ast.IfExp)
    named = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in scope.differentiable
    looked_at = isinstance(parent, ast.Attribute) and parent.attr in ("detach", "dtype", "shape", "device", "dim")
    of_type = isinstance(parent, ast.Call) and last_name(parent) in (
        "isinstance",
        "constant",
        "ones_like",
        "full_like",
        "readable",
        "zeros_like",
    )
    if method(node, "detach"):
        return
    if returned or (named and not looked_at and not of_type and not isinstance(parent, ast.Compare)):
        yield calls(node, "detach")


@operator
def multiply_for_where(node: ast.AST, scope: Scope) -> Iterator[ast.AST]:
    """A selection as a product: ``where(c, a, b)`` to ``c * a + ~c * b``, ``select(x, w)`` to ``x * (w != 0)``."""
    if (call := method(node, "where")) and len(call.args) == 3:
        condition, kept, other = call.args
        inverse = ast.UnaryOp(ast.Invert(), condition)
        yield ast.BinOp(ast.BinOp(condition, ast.Mult(), kept), ast.Add(), ast.BinOp(inverse, ast.Mult(), other))
    if (call := function(node, "select", "select_")) and len(call.args) == 2:
        values, weights = call.args
        product = ast.BinOp(values, ast.Mult(), ast.Compare(weights, [ast.NotEq()], [ast.Constant(0)]))
        yield ast.IfExp(ast.Compare(weights, [ast.Is()], [ast.Constant(None)]), values, product)


@operator
def swap_where(node: ast.AST, scope: Scope) -> Iterator[ast.AST]:
    """The branches of ``where``."""
    if (call := method(node, "where")) and len(call.args) == 3:
        yield ast.Call(call.func, [call.args[0], call.args[2], call.args[1]], call.keywords)


@operator
def min_for_max(node: ast.AST, scope: Scope) -> Iterator[ast.AST]:
    """``maximum`` and ``minimum``, ``max`` and ``min``, and the side of a one-sided clamp."""
    names = {"maximum": "minimum", "minimum": "maximum", "max": "min", "min": "max", "amax": "amin", "amin": "amax"}
    if call := method(node, *names):
        yield renamed(call, names[call.func.attr])  # type: ignore[attr-defined]  # a method
    if isinstance(node, ast.Constant) and node.value in ("amax", "amin"):
        yield ast.Constant(names[str(node.value)])
    if (call := method(node, "clamp", "clamp_")) and len(call.keywords) == 1 and not call.args:
        side = "min" if call.keywords[0].arg == "max" else "max"
        yield ast.Call(call.func, [], [ast.keyword(side, call.keywords[0].value)])


@operator
def drop_bound(node: ast.AST, scope: Scope) -> Iterator[ast.AST]:
    """One bound of a clamp, or a ``relu``."""
    if call := method(node, "clamp", "clamp_"):
        if len(call.args) == 2:
            yield ast.Call(call.func, [], [ast.keyword("min", call.args[0])])
            yield ast.Call(call.func, [], [ast.keyword("max", call.args[1])])
        else:
            yield receiver(call)
    if call := method(node, "relu", "relu_"):
        yield receiver(call)


@operator
def deaden_clamp(node: ast.AST, scope: Scope) -> Iterator[ast.AST]:
    """A tangent beyond a limit as a clamp, whose gradient is 0 there: ``bounded_exp(x)`` to ``x.clamp(max=20).exp()``."""
    if call := function(node, "bounded_exp", "bounded_expm1"):
        name = "exp" if last_name(call) == "bounded_exp" else "expm1"
        yield calls(calls(call.args[0], "clamp", max=ast.Constant(20.0)), name)


@operator
def mean_for_sum(node: ast.AST, scope: Scope) -> Iterator[ast.AST]:
    """``x.sum()`` and ``x.mean()``, and the metrics ``mean(x)`` and ``total(x)``."""
    if (call := method(node, "sum", "mean")) and not (isinstance(receiver(call), ast.Name) and call.args):
        yield renamed(call, "mean" if last_name(call) == "sum" else "sum")
    if call := function(node, "mean", "total"):
        yield ast.Call(ast.Name("total" if last_name(call) == "mean" else "mean"), call.args[:1], [])


@operator
def divide_twice(node: ast.AST, scope: Scope) -> Iterator[ast.AST]:
    """``a / b`` to ``a / b / b``."""
    if quotient := arithmetic(node, ast.Div):
        yield ast.BinOp(quotient, ast.Div(), quotient.right)
    if call := method(node, "reciprocal"):
        yield calls(call, "square")
    if call := method(node, "div", "div_"):
        yield ast.Call(ast.Attribute(call, last_name(call)), call.args, [])


@operator
def weigh_twice(node: ast.AST, scope: Scope) -> Iterator[ast.AST]:
    """A product with a weight, a mask or a coefficient, by it once more."""
    if product := arithmetic(node, ast.Mult):
        for weight in (product.left, product.right):
            if last_name(weight) in WEIGHTS:
                yield ast.BinOp(product, ast.Mult(), weight)
    if (call := method(node, "mul", "mul_")) and last_name(call.args[0]) in WEIGHTS:
        yield calls(call, last_name(call), call.args[0])


@operator
def local_count(node: ast.AST, scope: Scope) -> Iterator[ast.AST]:
    """The count of one call for that of the step: the first of what is added up, or no given total."""
    if (call := function(node, "sum")) and isinstance(call.args[0], ast.GeneratorExp):
        yield ast.Call(ast.Name("next"), [call.args[0], ast.Constant(0)], [])
    if isinstance(node, ast.Call) and node.args and last_name(node.args[-1]) == "counts":
        yield ast.Call(node.func, [*node.args[:-1], ast.Constant(None)], node.keywords)


@operator
def weaken_comparison(node: ast.AST, scope: Scope) -> Iterator[ast.AST]:
    """``!=`` to ``>``, and each of ``<``, ``<=``, ``>``, ``>=`` with the edge on the other side."""
    other: dict[type, ast.cmpop] = {
        ast.NotEq: ast.Gt(), ast.Lt: ast.LtE(), ast.LtE: ast.Lt(), ast.Gt: ast.GtE(), ast.GtE: ast.Gt(), ast.Eq: ast.LtE(),
    }  # fmt: skip
    if not isinstance(node, ast.Compare):
        return
    for i, op in enumerate(node.ops):
        if type(op) in other and not is_text(node.comparators[i]):
            yield ast.Compare(node.left, [*node.ops[:i], other[type(op)], *node.ops[i + 1 :]], node.comparators)


@operator
def negate_condition(node: ast.AST, scope: Scope) -> Iterator[ast.AST]:
    """What a branch, a filter or a mask asks; ``and`` and ``or``."""
    parent = scope.parent
    asked = isinstance(parent, ast.If | ast.IfExp | ast.While) and node is parent.test
    if asked or (isinstance(parent, ast.comprehension) and node in parent.ifs):
        yield ast.UnaryOp(ast.Not(), node)  # type: ignore[arg-type]  # an expression
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.Invert) and not asked:
        yield node.operand
    if isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
    other: dict[type, ast.operator] = {ast.BitOr: ast.BitAnd(), ast.BitAnd: ast.BitOr()}
    if (both := arithmetic(node, ast.BitOr, ast.BitAnd)) and not isinstance(parent, ast.Call):
        yield ast.BinOp(both.left, other[type(both.op)], both.right)
    if call := method(node, "logical_or", "logical_and"):
        yield renamed(call, "logical_and" if last_name(call) == "logical_or" else "logical_or")


@operator
def swap_arguments(node: ast.AST, scope: Scope) -> Iterator[ast.AST]:
    """Two neighbours among the arguments of a call, or among the values of a returned or assigned tuple."""

    def swaps(values: list[ast.expr]) -> Iterator[list[ast.expr]]:
        for i in range(len(values) - 1):
            pair = values[i : i + 2]
            fixed = (isinstance(v, ast.Starred | ast.GeneratorExp) or is_text(v) or is_none(v) for v in pair)
            if not any(fixed) and ast.dump(pair[0]) != ast.dump(pair[1]):
                yield [*values[:i], pair[1], pair[0], *values[i + 2 :]]

    if isinstance(node, ast.Call) and last_name(node) not in SYMMETRIC | {n.lstrip("_") for n in CHECKS}:
        yield from (ast.Call(node.func, args, node.keywords) for args in swaps(node.args))
    if (
        isinstance(node, ast.Tuple)
        and isinstance(node.ctx, ast.Load)
        and isinstance(scope.parent, ast.Return | ast.Assign)
    ):
        yield from (ast.Tuple(values) for values in swaps(node.elts))


@operator
def swap_constants(node: ast.AST, scope: Scope) -> Iterator[ast.AST]:
    """0 and 1, and 0.5 or 2 to 1."""
    parent = scope.parent
    if not isinstance(node, ast.Constant) or type(node.value) not in (int, float) or isinstance(parent, ast.Subscript):
        return
    for value, other in ((0, 1), (1, 0), (0.5, 1), (2, 1)):
        if node.value == value:
            yield ast.Constant(float(other) if isinstance(node.value, float) else other)
