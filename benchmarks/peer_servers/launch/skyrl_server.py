"""SkyRL's API server and engine, without ``uv run`` around them, and without torch.

Runs in SkyRL's environment: ``skyrl_server.py MODEL PORT STATE``, and by itself ``skyrl_server.py engine ...``.
"""

from __future__ import annotations

import importlib
import json
import runpy
import sys
import types
from pathlib import Path
from typing import Any


class LoraConfig:
    """What a checkpoint of an adapter says of it."""

    def __init__(self, **fields: Any) -> None:
        self.fields = {"peft_type": "LORA", "task_type": None, **fields}

    def save_pretrained(self, folder: str) -> None:
        (Path(folder) / "adapter_config.json").write_text(json.dumps(self.fields))


def without_torch() -> None:
    """Stand in for the two uses that the JAX back end has of torch: images, and peft's file beside an adapter."""
    importlib.import_module("transformers")  # before: it looks for torch too
    sys.modules["torch"] = types.ModuleType("torch")
    importlib.import_module("skyrl.backends.renderer")
    del sys.modules["torch"]
    peft: Any = types.ModuleType("peft")
    peft.LoraConfig = LoraConfig
    sys.modules["peft"] = peft


def serve(model: str, port: int, state: str) -> None:
    """Serve a model on this machine."""
    api: Any = importlib.import_module("skyrl.tinker.api")
    config: Any = importlib.import_module("skyrl.tinker.config")

    def engine_command(parent: list[str], given: object) -> list[str]:
        return [sys.executable, __file__, "engine", *config.config_to_argv(given)]

    api._build_uv_run_cmd_engine = engine_command
    api.app.state.engine_config = config.EngineConfig(
        base_model=model,
        backend="jax",
        backend_config={"max_lora_adapters": 256, "max_lora_rank": 8},
        checkpoints_base=f"{state}/checkpoints",
        database_url=f"sqlite:///{state}/tinker.db",
    )
    importlib.import_module("uvicorn").run(api.app, host="127.0.0.1", port=port)


if __name__ == "__main__":
    without_torch()
    if sys.argv[1] == "engine":
        del sys.argv[0]
        runpy.run_module("skyrl.tinker.engine", run_name="__main__")
    else:
        serve(sys.argv[1], int(sys.argv[2]), sys.argv[3])
