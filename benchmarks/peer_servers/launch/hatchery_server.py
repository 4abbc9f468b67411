"""Hatchery's gateway and worker in one process, on the CPU. In its environment: ``hatchery_server.py MODEL PORT STATE``."""

from __future__ import annotations

import importlib
import sys


def any_hyperparameter() -> None:
    """Lift the bounds of a step (learning rate up to 10, eps up to 1): checks step along the gradient, beside a large eps."""
    wire = importlib.import_module("hatchery.core.tinker_compat")
    for field in wire.AdamParams.model_fields.values():
        field.metadata.clear()
    for model in (wire.AdamParams, wire.OptimStepRequest):
        model.model_rebuild(force=True)


def serve(model: str, port: int, state: str) -> None:
    """Serve a model on this machine; its name there is its folder."""
    unified, gateway = (
        importlib.import_module("hatchery.core.unified"),
        importlib.import_module("hatchery.core.gateway"),
    )
    app = unified.create_unified_app(base_model=model, device="cpu", root=f"{state}/data")
    gateway.get_config().auth.add_key(
        "tml-none", user_id="dev", tier="enterprise", max_concurrent_sessions=500, max_rank=256
    )
    importlib.import_module("uvicorn").run(app, host="127.0.0.1", port=port)


if __name__ == "__main__":
    any_hyperparameter()
    serve(sys.argv[1], int(sys.argv[2]), sys.argv[3])
