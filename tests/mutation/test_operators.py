"""Mutation operators: each does what it says, in the places that it should and no others."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

if not (Path(__file__).parents[2] / "mutation").is_dir():
    pytest.skip("mutation testing is not part of the wheel", allow_module_level=True)

from mutation.operators import OPERATORS
from mutation.sites import mutants_of
from mutation.targets import mutants

ROOT = Path(__file__).parents[2]
CASES = [
    ("flip_sign", "-x + w", {"x"}),
    ("flip_sign", "x.neg()", {"x"}),
    ("swap_plus_minus", "x - w", {"x + w"}),
    ("swap_plus_minus", "x.add_(w)", {"x.sub_(w)"}),
    ("swap_plus_minus", "x + 'text'", set()),
    ("swap_times_divide", "x / w", {"x * w"}),
    ("drop_term", "x - w", {"x", "-w"}),
    ("drop_term", "x + w", {"x", "w"}),
    ("drop_term", "x.addcmul(w, w)", {"x"}),
    ("shift_index", "x[0]", {"x[1]"}),
    ("shift_index", "x[1:]", {"x[1 + 1:]"}),
    ("shift_index", "x[:n]", {"x[1:n]", "x[:n - 1]"}),
    ("shift_index", "x[w]", set()),
    ("remove_detach", "x.detach() * w", {"x"}),
    ("remove_detach", "x - constant(w)", {"w"}),
    ("multiply_for_where", "torch.where(c, x, 0.0)", {"c * x + ~c * 0.0"}),
    ("multiply_for_where", "select(x, w)", {"x if w is None else x * (w != 0)"}),
    ("swap_where", "torch.where(c, x, w)", {"torch.where(c, w, x)"}),
    ("min_for_max", "torch.maximum(x, w)", {"torch.minimum(x, w)"}),
    ("min_for_max", "x.clamp(min=1)", {"x.clamp(max=1)"}),
    ("min_for_max", "x.scatter_reduce(0, w, x, 'amax')", {"'amin'"}),
    ("drop_bound", "x.clamp(low, high)", {"x.clamp(min=low)", "x.clamp(max=high)"}),
    ("drop_bound", "x.clamp(min=1).log()", {"x"}),
    ("drop_bound", "x.relu()", {"x"}),
    ("deaden_clamp", "bounded_exp(x)", {"x.clamp(max=20.0).exp()"}),
    ("mean_for_sum", "x.sum()", {"x.mean()"}),
    ("mean_for_sum", "mean(x, n)", {"total(x)"}),
    ("divide_twice", "x / n", {"x / n / n"}),
    ("divide_twice", "x.reciprocal()", {"x.reciprocal().square()"}),
    ("weigh_twice", "x * weight", {"x * weight * weight"}),
    ("weigh_twice", "x.mul_(factor)", {"x.mul_(factor).mul_(factor)"}),
    ("weigh_twice", "x * n", set()),
    ("local_count", "sum(p.count for p in x)", {"next((p.count for p in x), 0)"}),
    ("local_count", "evaluate(x, self.counts)", {"evaluate(x, None)"}),
    ("weaken_comparison", "x != w", {"x > w"}),
    ("weaken_comparison", "x < w", {"x <= w"}),
    ("weaken_comparison", "low <= x <= high", {"low < x <= high", "low <= x < high"}),
    ("weaken_comparison", "x != 'text'", set()),
    ("negate_condition", "x if c else w", {"not c"}),
    ("negate_condition", "x and w", {"x or w"}),
    ("negate_condition", "[y for y in x if y]", {"not y"}),
    ("negate_condition", "~(x > w)", {"x > w"}),
    ("negate_condition", "(x > 0) & w", {"(x > 0) | w"}),
    ("swap_arguments", "f(x, w, n)", {"f(w, x, n)", "f(x, n, w)"}),
    ("swap_arguments", "f(x, None)", set()),
    ("swap_arguments", "torch.maximum(x, w)", set()),
    ("swap_constants", "x ** 0.5 + 1", {"1.0", "0"}),
    ("swap_constants", "x ** 3 + True", set()),
]


def changes(source: str, operator: str, *gradient_paths: str) -> set[str]:
    return {m.after for m in mutants_of("m.py", source, gradient_paths) if m.operator == operator}


@pytest.mark.parametrize(("operator", "expression", "expected"), CASES)
def test_an_operator_does_what_it_says(operator: str, expression: str, expected: set[str]) -> None:
    """Each change of an expression is made once, and nothing else."""
    assert changes(f"def f(x, w, n):\n    y = {expression}\n", operator) == expected


def test_every_operator_has_a_case() -> None:
    """None is without an example; that of the added detach needs a gradient path."""
    assert {name for name, *_ in CASES} == OPERATORS.keys() - {"add_detach"}


def test_a_detach_is_added_on_gradient_paths_only() -> None:
    """Tensors of a function that a gradient flows through, and what it returns; not where only the shape is looked at."""
    source = "def f(x: Tensor, n: int) -> Tensor:\n    return x * n if x.shape else x.detach()\n"
    assert changes(source, "add_detach", "f") == {"x.detach()"}
    assert changes("def f(x: Tensor) -> Tensor:\n    return g(x) + 1\n", "add_detach", "f") == {
        "x.detach()",
        "(g(x) + 1).detach()",
    }
    assert changes(source, "add_detach") == set()


def test_only_what_runs_in_a_function_is_changed() -> None:
    """No default, annotation, decorator, docstring or raised error; the conditions of a check are."""
    source = '''
LIMIT = 1 + 1

@decorated(0)
def f(x: Tensor[0] = -1) -> Tensor[1]:
    """Not 1 + 1."""
    if x > LIMIT:
        raise ValueError(f"{x + 1}", 0)
    return x
'''
    assert {m.after for m in mutants_of("m.py", source)} == {"not x > LIMIT", "x >= LIMIT"}


def test_the_rest_of_the_source_stays() -> None:
    """A change replaces its expression and keeps the bytes around it, of other alphabets too; the diff has both lines."""
    source = "def f(x):  # β\n    y = 'β' if x else (x -\n        1)  # why\n    return y\n"
    (mutant,) = [m for m in mutants_of("m.py", source) if m.operator == "swap_plus_minus"]
    assert mutant.source(source) == "def f(x):  # β\n    y = 'β' if x else ((x + 1))  # why\n    return y\n"
    assert mutant.diff(source).splitlines()[-1] == "+    y = 'β' if x else ((x + 1))  # why"
    assert mutant.lines == (2, 3)


ATOMS = st.sampled_from(["x", "w", "0", "1.0", "x.detach()", "x.sum()", "torch.where(x, w, 0)"])


def grown(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    pair = st.tuples(inner, st.sampled_from(["+", "-", "*", "/", "**", "<", "!=", "and", "&"]), inner)
    alone = st.sampled_from(["-({})", "~({})", "({}).clamp(min=0)", "f({}, w)", "({})[0]", "w if ({}) else x"])
    return pair.map(lambda p: f"({p[0]}) {p[1]} ({p[2]})") | st.tuples(alone, inner).map(lambda p: p[0].format(p[1]))


@given(expression=st.recursive(ATOMS, grown, max_leaves=8))
def test_a_mutant_is_its_change_of_the_tree(expression: str) -> None:
    """Whatever surrounds it, the changed text parses to the tree in which that one expression is replaced."""
    source = f"def f(x, w):\n    return {expression}\n"
    for mutant in mutants_of("m.py", source):
        changed = mutant.source(source)
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source))
        marked = source.encode()[: mutant.start].decode() + "MARK" + source.encode()[mutant.end :].decode()
        expected = ast.unparse(ast.parse(marked)).replace("MARK", f"({mutant.after})", 1)
        assert ast.dump(ast.parse(changed)) == ast.dump(ast.parse(expected))


def test_mutants_of_the_package_compile() -> None:
    """There are enough of them, of every operator, each with a key of its own."""
    found = list(mutants(ROOT))
    assert len(found) >= 300
    assert {mutant.operator for mutant in found} == OPERATORS.keys()
    assert len({mutant.key for mutant in found}) == len(found)
    sources = {mutant.path: (ROOT / mutant.path).read_text() for mutant in found}
    for mutant in found[::10]:
        ast.parse(mutant.source(sources[mutant.path]))
