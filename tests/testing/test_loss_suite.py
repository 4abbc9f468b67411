"""A test class of one's own loss: what is missing in it, or misspelt, is said once and in words."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from pullback.errors import ConfigError
from pullback.losses import DPO
from pullback.testing import LossProperties


def test_a_class_without_a_loss() -> None:
    """It may be a base of others, so that its tests say what to write, and not its definition."""

    class Base(LossProperties):
        options: ClassVar[dict[str, Any]] = {"kind": "pair"}

    class Mine(Base):
        loss = DPO()

    with pytest.raises(ConfigError, match="Base names no loss: write loss = my_loss"):
        Base.under_test()
    assert Mine.under_test().name == "dpo"


def test_an_option_that_does_not_exist() -> None:
    """It is refused where the class is written, with what is meant; those that exist are taken."""
    with pytest.raises(
        ConfigError, match=r"Mine.options has 'from' \(did you mean 'form'\?\); it may have: form, kind,"
    ):

        class Mine(LossProperties):
            loss = DPO()
            options: ClassVar[dict[str, Any]] = {"from": "padded"}
