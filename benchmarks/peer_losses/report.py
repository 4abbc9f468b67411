"""Run the checks on every wrapped function, and write down what they find, as JSON and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch

from pullback.testing import loss_report
from pullback.testing.enumerate import SmallPolicy, as_estimator, bias, reverse_kl
from pullback.testing.losscheck import loss_under_test
from pullback.testing.losscheck.forms.measured import kind_case

from .areal_losses import AREAL
from .hatchery_losses import HATCHERY
from .liger import LIGER, LIGER_SETTINGS
from .other_losses import OTHER_SETTINGS, OTHERS
from .skyrl_losses import SKYRL
from .torchrl_losses import TORCHRL
from .trl_policies import TRL_POLICIES
from .trl_preferences import TRL_PREFERENCES, TRL_SETTINGS
from .verl_losses import VERL, VERL_SETTINGS
from .wrapped import PEERS, Setting, Wrapped

__all__ = ["EXAMPLES", "SETTINGS", "WRAPPED", "changes", "checked", "run"]

WRAPPED: Final[Sequence[Wrapped]] = (
    *TRL_POLICIES,
    *TRL_PREFERENCES,
    *LIGER,
    *VERL,
    *SKYRL,
    *TORCHRL,
    *HATCHERY,
    *OTHERS,
    *AREAL,
)
SETTINGS: Final[Sequence[Setting]] = (*TRL_SETTINGS, *LIGER_SETTINGS, *VERL_SETTINGS, *OTHER_SETTINGS)
EXAMPLES: Final = 4  # random batches per property


def checked(wrapped: Wrapped) -> dict[str, Any]:
    """Return what is found out about one function."""
    torch.manual_seed(0)  # some draw at random
    function = wrapped.load()
    report = loss_report(function, examples=EXAMPLES, shrink=False, **wrapped.options)
    by_verdict: dict[str, list[str]] = {"passed": [], "failed": [], "not applicable": []}
    for result in report.results:
        by_verdict[result.verdict].append(result.property)
    found: dict[str, Any] = {
        "peer": wrapped.peer,
        "name": wrapped.name,
        "place": wrapped.place,
        "passed": len(by_verdict["passed"]),
        "not_applicable": by_verdict["not applicable"],
        "failed": {name: report[name].sentence for name in by_verdict["failed"]},
        "kind": loss_under_test(function, **wrapped.options).kind,
    }
    if wrapped.estimates:
        found["on_average"] = _on_average(function, wrapped)
    return found


def _on_average(function: Any, wrapped: Wrapped) -> dict[str, float | str]:
    """Return how the expected gradient of a KL compares with that of KL(policy || reference), on policy."""
    found = bias(as_estimator(function, **wrapped.options), reverse_kl, SmallPolicy.random(vocabulary=4).draws())
    return {"verdict": found.verdict, "size": round(found.size, 6), "error": round(found.error, 6)}


def changes(setting: Setting) -> bool:
    """Return whether a setting changes the loss or its gradient."""
    PEERS[setting.peer].prepare()
    case = kind_case(False)
    builds = (setting.without, setting.given)
    without, given = (loss_under_test(build(), **setting.options).measure(case) for build in builds)
    return without.value != given.value or not torch.equal(without.flat, given.flat)


def _tried(setting: Setting) -> dict[str, Any]:
    words = {"peer": setting.peer, "name": setting.name, "setting": setting.words, "place": setting.place}
    return {**words, "effect": changes(setting)}


def run(peers: Sequence[str]) -> dict[str, Any]:
    """Check all functions of some peers."""
    chosen = [wrapped for wrapped in WRAPPED if wrapped.peer in peers and wrapped.missing is None]
    settings = [setting for setting in SETTINGS if setting.peer in peers and PEERS[setting.peer].version]
    return {
        "versions": {peer: PEERS[peer].version for peer in dict.fromkeys(w.peer for w in chosen)},
        "torch": torch.__version__.split("+")[0],
        "examples": EXAMPLES,
        "functions": [checked(wrapped) for wrapped in chosen],
        "settings": [_tried(setting) for setting in settings],
    }
