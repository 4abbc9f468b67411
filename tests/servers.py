"""A service over a tiny model, for the tests of both of its sides."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import tiny_llama
from torch import Tensor

from pullback.backends import TorchBackend
from pullback.service import Base, Tenants

KEY = "tml-test"
# The SDK leaves its sockets to the garbage collector.
SDK_WARNINGS = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def tiny_tenants(root: Any) -> Tenants:
    """Models on a random Llama."""
    model: Any = tiny_llama(torch.float32).model
    return Tenants(Base("tiny", model, None, {"token_budget": 64}), root)


def served(tenants: Tenants, client: Any) -> TorchBackend:
    """The backend behind a training client."""
    return tenants.backends[client.model_id]


def twin(tenants: Tenants, client: Any) -> TorchBackend:
    """A native backend on a copy of the client's model."""
    return TorchBackend(copy.deepcopy(served(tenants, client).model), token_budget=64)


def adapter(backend: TorchBackend) -> dict[str, Tensor]:
    """What is trained."""
    return {name: p.detach().clone() for name, p in backend.model.named_parameters() if p.requires_grad}
