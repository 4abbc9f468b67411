"""The proof kit for losses: properties that every sound loss has, checked on anybody's loss in any form."""

from __future__ import annotations

from .check import check_loss, check_property, loss_report
from .forms import FORMS, LossUnderTest, loss_under_test
from .invariance import INVARIANCES
from .properties import LOSS_PROPERTIES
from .results import LossCheckError, LossReport, Property, Result
from .suite import LossProperties

__all__ = [
    "FORMS",
    "INVARIANCES",
    "LOSS_PROPERTIES",
    "LossCheckError",
    "LossProperties",
    "LossReport",
    "LossUnderTest",
    "Property",
    "Result",
    "check_loss",
    "check_property",
    "loss_report",
    "loss_under_test",
]
