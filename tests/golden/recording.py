"""What the makers of golden values share: the inputs that every peer is given, and how an answer is written down.

Inputs are drawn once, from one seed, and rounded to three decimals, so that the documents are short and every peer
sees the same numbers. ``logprobs`` is the policy, ``old_logprobs`` the anchor of its ratios, ``rollout_logprobs`` the
sampler and ``ref_logprobs`` the reference; all are [B, T], as are ``advantages`` and ``mask``.

* ``tokens``: one advantage per token, with both signs in each row; a mask with a hole.
* ``rows``: one advantage per row; the ratios of whole rows lie beyond the clip ranges, on both sides; row 2 is masked.
* ``full_rows``: the same with row 2 trained, for code that divides by the length of each row.
* ``far``: log-ratios to the reference so large that a guarded exponent or a clamped estimate is reached.
* ``pairs``: rows are chosen, chosen, rejected, rejected.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor

Inputs = dict[str, Tensor]

ROWS, WIDTH = 4, 7
# log(policy / old): inside every clip range, beyond 0.2 and 0.28 on both sides, beyond the 3 of dual clipping and CISPO's 5
TOKEN_DRIFTS = [0.05, -0.08, 0.22, -0.3, 0.9, -1.6, 1.75]
ROW_DRIFTS = [0.4, -0.5, 0.0, 1.4]  # the mean of each row
ROW_STALENESS = [0.21, -0.26, 0.0, 0.003]  # the mean of log(old / sampler) of each row
TOKEN_MASK = [[1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1, 1]]
ROW_MASK = [[1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0]]
PAIR_MASK = [[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]]


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import empty stand-ins for packages that a peer imports beside its losses, and that its losses do not call."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = frozenset(names)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname.split(".")[0] not in self._names:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = ModuleType(spec.name)
        module.__getattr__ = lambda name: MagicMock(name=name)  # type: ignore[method-assign]
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Leave it empty."""


def stand_in_for(*names: str) -> None:
    """Answer imports of these top-level packages with empty ones, installed or not."""
    sys.meta_path.insert(0, StandIns(names))


def golden_inputs() -> dict[str, Inputs]:
    """Return every set of inputs by name; float64."""
    generator = torch.Generator().manual_seed(11)
    sets = {"tokens": _tokens(generator), "rows": _rows(generator)}
    sets["full_rows"] = {**sets["rows"], "mask": _full(sets["rows"]["mask"])}
    sets["far"] = _far(generator)
    sets["pairs"] = _pairs(generator)
    return {name: {key: _round(value) for key, value in inputs.items()} for name, inputs in sets.items()}


def answer(loss: Tensor, leaf: Tensor) -> dict[str, Any]:
    """Return a loss and its gradient with respect to ``leaf``, in full precision."""
    (gradient,) = torch.autograd.grad(loss, leaf)
    if not bool(torch.isfinite(gradient).all()):
        raise ValueError("a golden gradient must be finite")
    return {"loss": float(loss.detach()), "gradient": gradient.tolist()}


def write(peer: str, version: str, inputs: dict[str, Inputs], entries: list[dict[str, Any]]) -> None:
    """Print the document, one entry a line."""
    names = [entry["name"] for entry in entries]
    if len(set(names)) != len(names):
        raise ValueError(f"two entries have one name: {sorted(n for n in names if names.count(n) > 1)}")
    used = {entry["inputs"] for entry in entries}
    head = {"made_by": f"tests/golden/make_{peer}.py", "peer": peer, "version": version, "torch": _torch_version()}
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    given = {name: {k: v.tolist() for k, v in values.items()} for name, values in inputs.items() if name in used}
    lines.append(f'"inputs": {json.dumps(given)}')
    body = ",\n".join(json.dumps({"peer": peer, "version": version, **entry}) for entry in entries)
    sys.stdout.write("{\n" + ",\n".join(lines) + ',\n"entries": [\n' + body + "\n]}\n")


def _tokens(generator: torch.Generator) -> Inputs:
    logprobs = _logprobs(generator)
    order = torch.stack([torch.randperm(WIDTH, generator=generator) for _ in range(ROWS)])
    advantages = _normal(generator)
    return {
        "logprobs": logprobs,
        "old_logprobs": logprobs - torch.tensor(TOKEN_DRIFTS, dtype=torch.float64)[order],
        "rollout_logprobs": logprobs
        - torch.tensor(TOKEN_DRIFTS, dtype=torch.float64)[order]
        - 0.6 * _normal(generator),
        "ref_logprobs": logprobs - 0.7 * _normal(generator),
        "advantages": advantages + 0.2 * advantages.sign(),
        "mask": torch.tensor(TOKEN_MASK, dtype=torch.float64),
    }


def _rows(generator: torch.Generator) -> Inputs:
    logprobs, mask = _logprobs(generator), torch.tensor(ROW_MASK, dtype=torch.float64)
    old = logprobs - _with_mean(ROW_DRIFTS, 0.3 * _normal(generator), mask)
    return {
        "logprobs": logprobs,
        "old_logprobs": old,
        "rollout_logprobs": old - _with_mean(ROW_STALENESS, 0.5 * _normal(generator), mask),
        "ref_logprobs": logprobs - 0.7 * _normal(generator),
        "advantages": torch.tensor([1.0, -0.8, 0.6, -1.2], dtype=torch.float64)[:, None].expand(-1, WIDTH).clone(),
        "mask": mask,
    }


def _far(generator: torch.Generator) -> Inputs:
    logprobs = _logprobs(generator) - 4.0
    distances = torch.tensor([0.5, -2.5, -2.7, 10.0, 12.0, -4.0, 1.5], dtype=torch.float64)
    return {
        "logprobs": logprobs,
        "ref_logprobs": logprobs - distances.expand(ROWS, -1),
        "mask": torch.tensor(TOKEN_MASK, dtype=torch.float64),
    }


def _pairs(generator: torch.Generator) -> Inputs:
    logprobs = _logprobs(generator)
    return {
        "logprobs": logprobs,
        "ref_logprobs": logprobs - 0.7 * _normal(generator),
        "mask": torch.tensor(PAIR_MASK, dtype=torch.float64),
    }


def _normal(generator: torch.Generator) -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)


def _logprobs(generator: torch.Generator) -> Tensor:
    return (-2.6 + 0.5 * _normal(generator)).clamp(max=-1.9)


def _with_mean(means: list[float], noise: Tensor, mask: Tensor) -> Tensor:
    """Return ``noise`` moved so that its mean over each row's mask is what is asked for."""
    count = mask.sum(-1, keepdim=True).clamp(min=1)
    own = (noise * mask).sum(-1, keepdim=True) / count
    return noise - own + torch.tensor(means, dtype=torch.float64)[:, None]


def _full(mask: Tensor) -> Tensor:
    filled = mask.clone()
    filled[2, :4] = 1.0
    return filled


def _round(values: Tensor) -> Tensor:
    return torch.round(values, decimals=3)


def _torch_version() -> str:
    return torch.__version__.split("+")[0]
