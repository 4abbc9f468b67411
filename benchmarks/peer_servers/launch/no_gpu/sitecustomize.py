"""Resetting CUDA's memory counters, as TuFT does at every micro-batch, does nothing where there is no GPU."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _MemoryCounters(MetaPathFinder):
    """Changes ``torch.cuda.memory`` as it is imported."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "torch.cuda.memory":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        loader: Any = spec.loader
        execute = loader.exec_module

        def changed(module: Any) -> None:
            execute(module)
            module.reset_peak_memory_stats = lambda device=None: None

        loader.exec_module = changed
        return spec


sys.meta_path.insert(0, _MemoryCounters())
