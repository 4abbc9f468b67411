"""Which servers there are, what they need on a machine without a GPU, and which SDK speaks to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, final

__all__ = ["PEERS", "Peer"]


@final
@dataclass(frozen=True)
class Peer:
    """One server.

    Args:
        name: of the project's package, with its version.
        python: of its environment.
        installs: arguments of one ``pip install`` each, in order.
        launcher: script in `launch` that is run there, with the model's folder, the port and a folder for its state.
        sdk: release of ``tinker`` that it speaks to.
        dtype: that it computes in.
        environment: variables of its process.
        without: what is done without here, for the report.
        timeout: seconds that an answer is waited for.
        isolated: it listens on all interfaces, so that it runs where there is no other than the loopback.
    """

    name: str
    python: str
    installs: Sequence[Sequence[str]]
    launcher: str
    sdk: str
    dtype: str = "float32"
    environment: Mapping[str, str] = field(default_factory=dict)
    without: str = ""
    timeout: int = 120
    isolated: bool = False


PEERS: Final[Mapping[str, Peer]] = {
    "skyrl": Peer(
        name="skyrl==0.4.0",
        python="python3.12",
        installs=[
            # its own dependencies include those of its GPU back ends
            ["--no-deps", "skyrl==0.4.0"],
            ["tinker==0.25.0", "jax>=0.8,<1.0", "flax>=0.12.10", "optax>=0.2.5", "transformers>=5.6.1,<=5.16.1"],
            ["fastapi", "uvicorn", "sqlmodel", "sqlalchemy[asyncio]", "aiosqlite", "asyncpg", "psycopg2-binary"],
            ["aiohttp", "cloudpathlib", "orjson", "pillow", "psutil", "pybase64", "safetensors", "xxhash"],
        ],
        launcher="skyrl_server.py",
        sdk="0.25.0",
        environment={"JAX_PLATFORMS": "cpu"},
        without="JAX back end on the CPU; stand-ins for torch (images) and for peft's LoraConfig; no `uv run`",
    ),
    "hatchery": Peer(
        name="hatchery-core==0.3.0",
        python="python3.11",
        installs=[
            ["torch==2.13.0"],
            # asks for Python 3.12 and torch 2.10, and runs on these
            ["--no-deps", "--ignore-requires-python", "hatchery-core==0.3.0", "hatchery-client==0.2.0"],
            ["fastapi", "uvicorn", "msgpack", "aiosqlite", "structlog", "httpx", "transformers", "peft", "zstandard"],
        ],
        launcher="hatchery_server.py",
        sdk="0.18.2",
        dtype="bfloat16",
        without="worker on the CPU, where its launcher would take a stub; the bounds on learning rate and eps lifted",
        timeout=45,  # an operation that its worker cannot do is never answered
    ),
    "tuft": Peer(
        name="tuft==0.2.2",
        python="python3.11",
        installs=[
            ["torch==2.13.0"],
            # asks for vLLM, which it imports for sampling alone
            ["--no-deps", "tuft==0.2.2"],
            ["tinker==0.25.0", "accelerate>=1.0.0", "fastapi>=0.133.0,<0.137.0", "omegaconf>=2.3.0", "psutil"],
            ["peft==0.20.0", "ray>=2.50.0", "transformers>=5.5.3,<6.0.0", "typer", "uvicorn[standard]", "nvidia-ml-py"],
            ["opentelemetry-api", "opentelemetry-sdk", "opentelemetry-exporter-otlp"],
            ["opentelemetry-instrumentation-fastapi", "opentelemetry-instrumentation-logging"],
        ],
        launcher="tuft_server.py",
        sdk="0.25.0",
        environment={"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"},
        without="training alone, as sampling needs vLLM; Ray is told of a GPU that is not there",
        isolated=True,
    ),
}
