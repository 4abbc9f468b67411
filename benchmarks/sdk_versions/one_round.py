"""One round of training and sampling by whichever release of the official SDK is installed: ``one_round.py URL MODEL``.

It needs nothing of this package, and only what every release has or `STEPS` may leave out.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any, Final

import tinker
import torch
from tinker import types

TOKENS: Final = [5, 9, 2, 7, 1, 3, 8, 4]
STEPS: Final = ("create", "train", "custom", "save", "load", "from_state", "sample", "score", "listings", "download")
ABSENT: Final = "absent"


def ready(value: Any) -> Any:
    """Return what a release may give at once or as a future."""
    return value.result() if hasattr(value, "result") else value


def datum() -> Any:
    """Return one datum of next tokens."""
    inputs = {"target_tokens": torch.tensor(TOKENS[1:]), "weights": torch.ones(len(TOKENS) - 1)}
    tensors = {key: types.TensorData.from_torch(value) for key, value in inputs.items()}
    return types.Datum(model_input=types.ModelInput.from_ints(TOKENS[:-1]), loss_fn_inputs=tensors)


class Round:
    """The steps, in their order; each raises where what came back is not right."""

    def __init__(self, url: str, model: str) -> None:
        self.service, self.model = tinker.ServiceClient(base_url=url), model

    def create(self) -> None:
        names = [one.model_name for one in self.service.get_server_capabilities().supported_models]
        assert names == [self.model], names
        self.trainer = ready(self.service.create_lora_training_client(base_model=self.model, rank=4))
        assert ready(self.trainer.get_info()).model_data.model_name == self.model

    def train(self) -> None:
        losses = [self._step(self.trainer) for _ in range(4)]
        assert losses == sorted(losses, reverse=True), losses

    def custom(self) -> None:
        before = self._scores(self.trainer)

        def twice(data: Any, logprobs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
            return -2 * logprobs[0].sum(), {"twice": float(-2 * logprobs[0].sum())}

        output = ready(self.trainer.forward_backward_custom([datum()], twice))
        ready(self.trainer.optim_step(types.AdamParams(learning_rate=1e-2)))
        assert abs(output.metrics["twice"] + 2 * sum(before)) < 1e-3
        assert sum(self._scores(self.trainer)) > sum(before)

    def save(self) -> None:
        self.path = ready(self.trainer.save_state("one")).path
        self.saved = self._scores(self.trainer)

    def load(self) -> None:
        self._step(self.trainer)
        assert self._apart(self._scores(self.trainer), self.saved) > 1e-3
        ready(self.trainer.load_state(self.path))
        assert self._apart(self._scores(self.trainer), self.saved) < 1e-5

    def from_state(self) -> None:
        other = ready(self.service.create_training_client_from_state(self.path))
        assert self._apart(self._scores(other), self.saved) < 1e-5
        self._step(other)

    def sample(self) -> None:
        self.sampler = ready(self.trainer.save_weights_and_get_sampling_client(name="two"))
        params = types.SamplingParams(max_tokens=5, seed=1)
        prompt = types.ModelInput.from_ints(TOKENS)
        found = ready(self.sampler.sample(prompt=prompt, num_samples=2, sampling_params=params)).sequences
        assert len(found) == 2
        assert all(len(one.tokens) == len(one.logprobs) > 0 for one in found)

    def score(self) -> None:
        found = ready(self.sampler.compute_logprobs(types.ModelInput.from_ints(TOKENS)))
        assert found[0] is None
        assert self._apart(found[1:], self.saved) < 1e-4

    def listings(self) -> None:
        client = self.service.create_rest_client()
        found = ready(client.list_checkpoints(self.path.split("/")[2])).checkpoints
        assert self.path in [one.tinker_path for one in found]

    def download(self) -> str | None:
        client = self.service.create_rest_client()
        if hasattr(self.trainer, "save_weights_external"):
            path = ready(self.trainer.save_weights_external("three")).path
            names = set(ready(client.get_external_weights_urls(path)).urls)
        elif hasattr(client, "get_checkpoint_archive_url_from_tinker_path"):
            url = ready(client.get_checkpoint_archive_url_from_tinker_path(self.path)).url
            with urllib.request.urlopen(url) as answer, tarfile.open(fileobj=io.BytesIO(answer.read())) as archive:
                names = set(archive.getnames())
        else:
            return ABSENT
        assert {"adapter_config.json", "adapter_model.safetensors"} <= names, names
        return None

    def _step(self, trainer: Any) -> float:
        output = trainer.forward_backward([datum()], "cross_entropy")
        step = trainer.optim_step(types.AdamParams(learning_rate=1e-2))
        loss = float(ready(output).metrics["loss:sum"])
        ready(step)
        return loss

    def _scores(self, trainer: Any) -> list[float]:
        output = ready(trainer.forward([datum()], "cross_entropy"))
        return [float(x) for x in output.loss_fn_outputs[0]["logprobs"].data]

    @staticmethod
    def _apart(first: Sequence[float], second: Sequence[float]) -> float:
        return max(abs(a - b) for a, b in zip(first, second, strict=True))


def outcome(step: Callable[[], str | None]) -> str:
    """Run a step; return ``ok``, ``absent``, or its error."""
    try:
        return step() or "ok"
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]


if __name__ == "__main__":
    one = Round(*sys.argv[1:3])
    print(json.dumps({name: outcome(getattr(one, name)) for name in STEPS}), flush=True)
    os._exit(0)  # some releases leave threads behind that never end
