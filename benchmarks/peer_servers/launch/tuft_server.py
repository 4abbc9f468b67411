"""TuFT on a machine without a GPU. Runs in TuFT's environment: ``tuft_server.py MODEL PORT STATE``."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

NO_GPU = Path(__file__).parent / "no_gpu"


def serve(model: str, port: int, state: str) -> None:
    """Serve a model on this machine, for training alone; its name there is its folder."""
    config = Path(state) / "tuft.yaml"
    config.write_text(
        f"""checkpoint_dir: {state}/checkpoints
supported_models:
  - {{model_name: {model}, model_path: {model}, max_model_len: 512, capabilities: [training], max_lora_rank: 8, max_loras: 256}}
authorized_users: {{tml-none: local-user}}
"""
    )
    # its workers import `sitecustomize`, which takes a call away that needs CUDA
    path = {"PYTHONPATH": os.pathsep.join(filter(None, (str(NO_GPU), os.environ.get("PYTHONPATH"))))}
    ray = importlib.import_module("ray")
    ray.init(num_gpus=1, num_cpus=2, include_dashboard=False, runtime_env={"env_vars": path})
    sys.argv = ["tuft", "launch", "--config", str(config), "--port", str(port), "--host", "127.0.0.1"]
    importlib.import_module("tuft.cli").main()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), sys.argv[3])
