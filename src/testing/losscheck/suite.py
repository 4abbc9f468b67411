"""One test per property, for a test class of one's own loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Final, final

from ...errors import ConfigError, suggestion
from .check import check_loss, check_property
from .forms import LossUnderTest, loss_under_test
from .properties import LOSS_PROPERTIES
from .results import LossCheckError, LossReport

__all__ = ["Checker", "LossProperties"]

_OPTIONS: Final = tuple(inspect.signature(loss_under_test).parameters)[1:]


@final
@dataclass(frozen=True)
class Checker:
    """What the fixture ``pullback_check`` is: `check_loss` with a number of examples of its own.

    Attributes:
        examples: random batches per property.
    """

    examples: int

    def __call__(self, loss: Any, **options: Any) -> LossReport:
        """Check all properties; options as of `check_loss`."""
        return check_loss(loss, **{"examples": self.examples, **options})

    def property(self, under_test: LossUnderTest, name: str) -> None:
        """Check one property; the running test is skipped where it does not apply.

        Raises:
            LossCheckError: it fails.
        """
        import pytest

        result = check_property(under_test, name, self.examples)
        if result.verdict == "not applicable":
            pytest.skip(result.sentence)
        if result.verdict == "failed":
            raise LossCheckError(LossReport.of(under_test, [result]))


class LossProperties:
    """A base of test classes: one test for each property of a loss.

    ::

        class TestMine(LossProperties):
            loss = my_loss
            options = {"form": "padded"}

    Attributes:
        loss: a `Loss` or a function.
        options: of `check_loss`: form, kind, expected, detached, arguments, per_sequence, invariant.
    """

    loss: ClassVar[Any]
    options: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Refuse an option that `check_loss` has not, once, where the class is written."""
        super().__init_subclass__(**keywords)
        for name in cls.options:
            if name not in _OPTIONS:
                raise ConfigError(
                    f"{cls.__name__}.options has {name!r}{suggestion(name, _OPTIONS)}; it may have: {', '.join(_OPTIONS)}"
                )

    @classmethod
    def under_test(cls) -> LossUnderTest:
        """Return the loss of the class, which a function is no method of.

        Raises:
            ConfigError: the class names no loss.
        """
        loss = inspect.getattr_static(cls, "loss", None)
        if loss is None:
            raise ConfigError(f"{cls.__name__} names no loss: write loss = my_loss in it, a Loss or a function")
        return loss_under_test(getattr(loss, "__func__", loss), **cls.options)


def _test_of(name: str) -> Callable[[LossProperties, Checker], None]:
    def test(self: LossProperties, pullback_check: Checker) -> None:
        pullback_check.property(self.under_test(), name)

    test.__name__ = f"test_{name}"
    test.__qualname__ = f"LossProperties.test_{name}"
    test.__doc__ = LOSS_PROPERTIES[name].proves
    return test


for _name in LOSS_PROPERTIES:
    setattr(LossProperties, f"test_{_name}", _test_of(_name))
