"""A stand-in for any of TRL's trainers; a part of `make_trl.py`."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch

__all__ = ["stand_in"]


def stand_in(**attributes: Any) -> Any:
    """Anything a method may ask of its trainer; what matters is given."""
    trainer = MagicMock()
    trainer.model.training = True
    trainer._metrics = defaultdict(lambda: defaultdict(list))
    trainer.accelerator = SimpleNamespace(
        num_processes=1,
        device=torch.device("cpu"),
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, **_: x,
    )
    trainer.aux_loss_enabled = False
    for name, value in attributes.items():
        setattr(trainer, name, value)
    return trainer
