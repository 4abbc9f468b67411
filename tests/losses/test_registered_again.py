"""A cell of a notebook that registers a loss may run again; any other class of a name that is taken is refused."""

from __future__ import annotations

from typing import Any

import pytest

from pullback.errors import DuplicateLossError
from pullback.losses import Registry

CELL = """
from dataclasses import dataclass
from typing import ClassVar
from pullback.losses import Loss, TokenTerm
from pullback.losses.functional import nll

@dataclass(frozen=True)
class {name}(Loss):
    scale: float = {scale}
    aggregation: str = "sum"
    name: ClassVar = "mine"
    gradient_kind: ClassVar = "constant"
    sources: ClassVar = ()
    required_inputs: ClassVar = ("weights",)

    def terms(self, batch):
        return (TokenTerm("nll", nll, (), self.main_aggregation, self.scale),)
"""


def run(module: str, name: str = "Mine", scale: float = 1.0) -> Any:
    """Return the class that a cell defines in a module."""
    namespace: dict[str, Any] = {"__name__": module}
    exec(CELL.format(name=name, scale=scale), namespace)
    return namespace[name]


def test_the_last_run_of_a_cell_counts() -> None:
    registry = Registry()
    registry.register(run("__main__"))
    again = registry.register(run("__main__", scale=2.0))
    assert registry.get("mine") is again
    assert registry.build("mine") == again(scale=2.0)


@pytest.mark.parametrize("others", [("math", "Mine"), ("__main__", "Other")])
def test_another_class_of_the_name_is_refused(others: tuple[str, str]) -> None:
    """Of another module, or another class; and so is the same one of a module that is imported twice."""
    registry = Registry()
    first = registry.register(run("__main__"))
    with pytest.raises(DuplicateLossError, match=r"'mine' belongs to __main__.Mine; choose another"):
        registry.register(run(*others))
    assert registry.get("mine") is first
    imported = Registry()
    imported.register(run("math"))
    with pytest.raises(DuplicateLossError):
        imported.register(run("math"))
