"""``pullback serve`` in two processes, and a training that any service can be asked for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import tinker
import torch
from helpers import make_data, tiny_llama
from many_ranks.ranks import start_ranks
from ports import reserved_port
from safetensors.torch import load_file
from served import service_rank
from servers import KEY, finished, json_datum

from pullback.backends.remote.sdk.convert import ready
from pullback.datums import to_tinker
from pullback.service import Base, ServedModels

__all__ = ["DISK", "RankedService", "asked", "one_process", "ranked", "trained"]

DISK = 2_000_000  # bytes of all checkpoints
_SECONDS = 600.0
_TIMEOUT = 60.0  # of the processes for each other
_KEPT = ("target_tokens", "weights", "logprobs", "advantages")


class RankedService:
    """A service of two processes.

    Attributes:
        url: base URL.
        root: folder of its checkpoints.
        processes: rank 0, which speaks HTTP, and rank 1.
    """

    def __init__(self, folder: Path, timeout: float) -> None:
        port = reserved_port()
        self.url, self.root = f"http://127.0.0.1:{port}", folder / "checkpoints"
        options = {"model": folder / "model", "name": "tiny", "port": port, "checkpoints": self.root}
        options |= {"token-budget": 64, "dtype": "float64", "timeout": timeout, "disk-per-key": DISK}
        given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        self.processes = start_ranks(Path(service_rank.__file__), "serve", *given)

    def wait(self) -> None:
        """Wait until it answers."""
        deadline = time.monotonic() + _SECONDS
        while time.monotonic() < deadline and all(process.poll() is None for process in self.processes):
            try:
                httpx.get(f"{self.url}/api/v1/healthz")
                return
            except httpx.TransportError:
                time.sleep(0.05)
        raise RuntimeError("the service did not start")

    def end(self, everyone: bool = False) -> list[int]:
        """Ask rank 0 to end, or all of them as torchrun does; return how both have ended."""
        for process in self.processes if everyone else self.processes[:1]:
            process.terminate()
        for process in self.processes:
            process.communicate(timeout=_SECONDS)
        return [process.returncode for process in self.processes]


@contextmanager
def ranked(folder: Path, timeout: float = _TIMEOUT) -> Iterator[RankedService]:
    """Run a service on a model that is written to ``folder / model``; its processes wait so long for each other, in seconds."""
    model: Any = tiny_llama(torch.float64).model
    model.save_pretrained(folder / "model")
    service = RankedService(folder, timeout)
    try:
        service.wait()
        yield service
    finally:
        for process in service.processes:
            process.kill()
            process.communicate()


def one_process(folder: Path) -> ServedModels:
    """Return the same model, to be served by this process alone."""
    model: Any = tiny_llama(torch.float64).model
    return ServedModels(Base("tiny", model, None, {"token_budget": 64, "mesh": None}), folder / "alone")


def asked(http: httpx.Client, model: str, route: str, seq_id: int, **body: Any) -> Any:
    """Return the answer to a numbered request of plain HTTP."""
    return finished(http, http.post(route, json={"model_id": model, "seq_id": seq_id, **body}).json()["request_id"])


def gradient(*tokens: list[int]) -> dict[str, Any]:
    """Return the body of a gradient on sequences in which every token is its own target."""
    return {"forward_backward_input": {"data": [json_datum(each) for each in tokens], "loss_fn": "cross_entropy"}}


def _data(seed: int) -> list[tinker.Datum]:
    data = make_data([6, 5, 7, 4, 3], seed)
    return to_tinker([type(d)(d.model_input, {key: d.loss_fn_inputs[key] for key in _KEPT}) for d in data])


def _coupled(data: Any, logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    return torch.logsumexp(torch.stack([x.sum() for x in logprobs]), 0), {}


def trained(url: str, root: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train two adapters in turn by the official SDK; return every number that came back, and what was saved."""
    numbers: list[float] = []
    params = tinker.AdamParams(learning_rate=1e-2)
    with tinker.ServiceClient(base_url=url, api_key=KEY) as service:
        clients = [service.create_lora_training_client("tiny", rank=2, seed=seed).result() for seed in (3, 4)]
        for step, client in enumerate([*clients, *clients]):
            numbers += _numbers(client.forward_backward(_data(step), "ppo").result(timeout=_SECONDS))
            numbers += _numbers(client.forward_backward_custom(_data(step + 9), _coupled).result(timeout=_SECONDS))
            numbers += _numbers(client.optim_step(params).result(timeout=_SECONDS))
        path = clients[0].save_state("half").result(timeout=_SECONDS).path
        again = service.create_training_client_from_state_with_optimizer(path).result(timeout=_SECONDS)
        numbers += _numbers(again.forward_backward(_data(5), "ppo").result(timeout=_SECONDS))
        numbers += _numbers(again.optim_step(params).result(timeout=_SECONDS))
        sampler = ready(again.save_weights_and_get_sampling_client(), _SECONDS)
        prompt = tinker.ModelInput.from_ints([3, 5, 2, 7])
        numbers += [x for x in sampler.compute_logprobs(prompt).result(timeout=_SECONDS) if x is not None]
        assert again.save_weights_for_sampler("named").result(timeout=_SECONDS).path
        saved = again.save_state("end").result(timeout=_SECONDS).path
    model, kind, name = saved.removeprefix("tinker://").split("/")
    folder = root / model.replace(":", "_") / kind / name
    files = {
        file.name: load_file(file) for file in sorted(folder.glob("*.safetensors")) if file.name != "random.safetensors"
    }
    return numbers, {f"{file}/{key}": tensor for file, tensors in files.items() for key, tensor in tensors.items()}


def _numbers(result: Any) -> list[float]:
    own = ("graph_bytes:max", "recomputed_tokens:sum")  # of each process's share
    outputs = getattr(result, "loss_fn_outputs", [])
    scored = [x for output in outputs for x in output["logprobs"].data]
    return [*scored, *(value for key, value in sorted(result.metrics.items()) if key not in own)]
