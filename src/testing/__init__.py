"""Tools that test losses and backends, yours too: small exact models, cases, closed-form oracles, properties, promises.

`pullback.testing.strategies` needs hypothesis; import it by name.
"""

from __future__ import annotations

from ..deprecation import moved
from . import oracles
from .agreement import Agreement, sampling_agreement
from .backend_diff import TOLERANCES, BackendDiff, Tolerance, diff
from .cases import Case, CaseSequence
from .conformance import PROMISES, BackendReport, backend_report, check_backend
from .datacheck import DataRow, check_builder
from .examples import example_datums
from .losscheck import LOSS_PROPERTIES, LossCheckError, LossProperties, LossReport, loss_report
from .modelcheck.check import ModelRow, check_model
from .modelcheck.numerics import NumericsRow, head_numerics, model_numerics
from .models.leaky import FutureLeakLM, PackingLeakLM, RowLeakLM
from .models.llama import random_llama
from .models.smollm2 import smollm2_folder
from .models.tiny import TinyLM
from .properties import check_loss, cotangent
from .resume import verify_resume
from .under_test import BackendUnderTest

__all__ = [
    "LOSS_PROPERTIES",
    "PROMISES",
    "TOLERANCES",
    "Agreement",
    "BackendDiff",
    "BackendReport",
    "BackendUnderTest",
    "Case",
    "CaseSequence",
    "DataRow",
    "FutureLeakLM",
    "LossCheckError",
    "LossProperties",
    "LossReport",
    "ModelRow",
    "NumericsRow",
    "PackingLeakLM",
    "RowLeakLM",
    "TinyLM",
    "Tolerance",
    "backend_report",
    "check_backend",
    "check_builder",
    "check_loss",
    "check_model",
    "cotangent",
    "diff",
    "example_datums",
    "head_numerics",
    "loss_report",
    "model_numerics",
    "oracles",
    "random_llama",
    "sampling_agreement",
    "smollm2_folder",
    "verify_resume",
]

__getattr__ = moved(__name__, {"Subject": ("testing", "BackendUnderTest")})
