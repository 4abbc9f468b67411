"""The platform that verl lacks: a CPU. To be imported before anything else of verl."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry


class _Device(ModuleType):
    """torch.cpu, with those names of an accelerator's module that verl asks for."""

    def __getattr__(self, name: str) -> Any:
        if name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
            return lambda *_, **__: 0
        if name == "mem_get_info":
            return lambda *_, **__: (1 << 34, 1 << 34)
        if name in ("empty_cache", "ipc_collect", "reset_peak_memory_stats"):
            return lambda *_, **__: None
        return getattr(torch if name == "set_rng_state" else torch.cpu, name)


class _CPU(PlatformBase):  # type: ignore[misc]  # verl has no types
    """What verl 0.9.1 asks of a platform, answered for a CPU."""

    device_name = vendor_name = property(lambda self: "cpu")
    device_module = property(lambda self: _Device("cpu"))

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return True

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def device_count(self) -> int:
        return 1

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return (None, None)

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    def nvtx_range(self, msg: str) -> AbstractContextManager[None]:
        return nullcontext()

    def get_device_uuid(self, device_id: int) -> str:
        return "cpu"

    def ray_resource_name(self) -> str:
        return "CPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def ray_resource_options(self, num_gpus: float) -> dict[str, float]:
        return {"num_cpus": 1}

    def is_ipc_supported(self) -> bool:
        return False

    def rollout_env_vars(self) -> dict[str, str]:
        return {}

    def _nothing(self, *_: Any, **__: Any) -> None:
        """Where a CPU has nothing to do."""

    set_device = synchronize = set_allocator_settings = empty_cache = profiler_start = profiler_stop = _nothing
    apply_model_patches = get_collective_module = cudart = _nothing


PlatformRegistry.register(platform="cpu")(_CPU)
os.environ["VERL_PLATFORM"] = "cpu"  # read when the engine's module is imported
