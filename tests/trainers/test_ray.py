"""Ray Train on two workers: the gradient of the plain formula over the tokens of both, and a backend over both."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from many_ranks.ranks import SEARCHED
from other_trainers.trainer_checks import TOLERANCE, error, gradient, mean_of_means, token_mean
from toy_rows import rows, toy_model

from pullback.backends import AdamParams, HFModel, TorchBackend
from pullback.datums import from_rows

ray = pytest.importorskip("ray", reason="needs Ray: make trainers TRAINERS=ray")
pytest.importorskip("ray.train", reason="needs Ray Train: make trainers TRAINERS=ray")
import ray_backend  # noqa: E402
import ray_train  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of Ray


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    environment = {
        "PYTHONPATH": os.pathsep.join(map(str, SEARCHED)),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    ray.init(
        address="local",
        num_cpus=3,
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        runtime_env={"env_vars": environment},
        object_store_memory=100 * 2**20,
    )
    yield
    ray.shutdown()


@pytest.mark.parametrize("accumulation", [1, 4])
def test_two_workers(accumulation: int, cluster: None, tmp_path: Path) -> None:
    """Against the plain formula; a mean of the micro-batches' means would be another gradient."""
    ray_train.run(str(tmp_path / "gradient.pt"), accumulation)
    found = torch.cat([g.flatten() for g in torch.load(tmp_path / "gradient.pt")])
    model = toy_model()
    exact = gradient(model, token_mean(model, rows()))
    assert error(found, exact) < TOLERANCE[torch.float32]
    assert error(gradient(model, mean_of_means(model, rows(), 4 // accumulation, True)), exact) > 0.3


def test_a_backend_on_two_workers(cluster: None, tmp_path: Path) -> None:
    """The log-probs after two steps are those of one process; after one step they are not."""
    ray_backend.run(str(tmp_path), steps=2)
    found = torch.cat(torch.load(tmp_path / "logprobs.pt"))
    data, _ = from_rows(rows(), None)
    backend, errors = TorchBackend(HFModel(toy_model())), []
    for _ in range(2):
        backend.forward_backward(data, "cross_entropy")
        backend.optim_step(AdamParams(learning_rate=1e-2), "num_loss_tokens").result()
        output = backend.forward(data, "cross_entropy").result()
        errors.append(error(found, torch.cat([x["logprobs"].to_torch() for x in output.loss_fn_outputs])))
    assert errors[0] > 1e-2
    assert errors[1] < TOLERANCE[torch.float32]
