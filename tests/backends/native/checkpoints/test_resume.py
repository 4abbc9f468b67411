"""Checkpoints: uninterrupted equals resumed in another process, and differs from a cold optimizer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import distance, make_data, tiny_llama, weights_of
from torch import nn

from pullback.backends import AdamParams, SamplingParams, TorchBackend
from pullback.backends.native.checkpoints import files as state
from pullback.backends.native.optimizer import Optimizer
from pullback.datums import ModelInput
from pullback.errors import BackendError, CheckpointError
from pullback.testing import TinyLM, verify_resume

DATA = make_data([4, 6, 3, 5])
PARAMS = AdamParams(learning_rate=1e-2, weight_decay=0.01)
KINDS = ["full", "lora", "half"]


def make(kind: str, folder: Path) -> TorchBackend:
    models: dict[str, Callable[[], nn.Module]] = {
        "full": lambda: TinyLM(dtype=torch.float32),
        "lora": lambda: tiny_llama(torch.float32, lora=2),
        "half": lambda: TinyLM(dtype=torch.bfloat16),
    }
    return TorchBackend(models[kind](), checkpoint_dir=folder)


def until_saved(kind: str, folder: Path) -> TorchBackend:
    """Two steps, then half of the next accumulation, then a checkpoint."""
    backend = make(kind, folder)
    for _ in range(2):
        backend.forward_backward(DATA, "dpo").result()
        backend.optim_step(PARAMS).result()
    backend.sample([ModelInput.from_ints([1])], 2, SamplingParams(max_tokens=3)).result()
    backend.forward_backward(DATA[:2], "dpo").result()
    backend.save_state("middle").result()
    return backend


def finish(backend: TorchBackend) -> tuple[dict[str, torch.Tensor], list[int]]:
    backend.forward_backward(DATA[2:], "dpo").result()
    output = backend.optim_step(PARAMS).result()
    assert output.divided_by == 2
    (rollout,) = backend.sample([ModelInput.from_ints([1])], 1, SamplingParams(max_tokens=5, stop=[])).result()
    return weights_of(backend), rollout.tokens


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_resume_in_a_new_process(kind: str, tmp_path: Path) -> None:
    """A process saves and is killed; a new one makes the very step the first would have made, and samples the same."""
    root = Path(__file__).parents[4]
    saved = f"test_resume.until_saved({kind!r}, test_resume.Path({str(tmp_path)!r}))"
    code = f"import os, torch, test_resume; torch.set_num_threads(1); {saved}; os.kill(os.getpid(), 9)"
    folders = [Path(__file__).parent, root / ".alias", root / "tests" / "support"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, folders), *sys.path])}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, check=False)
    assert done.returncode == -9
    expected, tokens = finish(until_saved(kind, tmp_path / "uninterrupted"))
    resumed = make(kind, tmp_path)
    resumed.load_state_with_optimizer(tmp_path / "middle").result()
    assert resumed.weights_version == 2
    found, again = finish(resumed)
    assert distance(found, expected) == 0.0
    assert again == tokens
    cold = make(kind, tmp_path)
    cold.load_state(tmp_path / "middle").result()
    cold.forward_backward(DATA, "dpo").result()
    cold.optim_step(PARAMS).result()
    assert distance(weights_of(cold), expected) > 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_verify_resume(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The public three-arm check passes, and fails for a backend that forgets its optimizer."""

    def step(backend: TorchBackend) -> None:
        backend.forward_backward(DATA, "dpo").result()
        backend.optim_step(PARAMS).result()

    verify_resume(lambda: make(kind, tmp_path), step)
    monkeypatch.setattr(Optimizer, "restore", lambda self, saved: self.reset())
    with pytest.raises(AssertionError, match="not the uninterrupted"):
        verify_resume(lambda: make(kind, tmp_path), step)


def test_adapter_is_in_peft_format(tmp_path: Path) -> None:
    """peft itself loads the checkpoint's folder, and its model gives our log-probs."""
    import peft

    backend = until_saved("lora", tmp_path)
    base = tiny_llama(torch.float32).model
    loaded: Any = peft.PeftModel.from_pretrained(base, str(tmp_path / "middle"))
    tokens = DATA[0].model_input.tokens[None]
    targets = DATA[0].loss_fn_inputs["target_tokens"].to_torch()
    theirs = loaded(input_ids=tokens).logits[0].log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    ours = backend.forward(DATA).result().loss_fn_outputs[0]["logprobs"].to_torch()
    assert torch.allclose(theirs, ours, atol=1e-5)


def test_crash_while_saving_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that dies half-way leaves the previous one loadable, and no debris."""
    backend = until_saved("full", tmp_path)
    before = weights_of(backend)
    finish(backend)
    with monkeypatch.context() as patch:
        patch.setattr(state, "_sync", lambda path: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            backend.save_state("middle", overwrite=True).result()
    assert [p.name for p in tmp_path.iterdir()] == ["middle"]
    backend.load_state_with_optimizer(tmp_path / "middle").result()
    assert distance(weights_of(backend), before) == 0.0


def test_bad_checkpoints(tmp_path: Path) -> None:
    """Missing, damaged, foreign, taken and ill-named checkpoints are told apart, and nothing changes."""
    backend = until_saved("full", tmp_path)
    backend.discard_gradients()
    before = weights_of(backend)

    def refused(error: type[Exception], words: str, future: Any) -> None:
        with pytest.raises(error, match=words):
            future.result()

    refused(CheckpointError, "no manifest", backend.load_state(tmp_path / "nowhere"))
    refused(CheckpointError, "exists", backend.save_state("middle"))
    refused(CheckpointError, "letters", backend.save_state("../escape"))
    other = TorchBackend(TinyLM(hidden=16, dtype=torch.float32))
    refused(CheckpointError, "not those of this model", other.load_state(tmp_path / "middle"))
    refused(CheckpointError, "another kind of model", make("lora", tmp_path).load_state(tmp_path / "middle"))
    backend.forward_backward(DATA, "dpo").result()
    refused(BackendError, "gradients .* have accumulated", backend.load_state(tmp_path / "middle"))
    backend.discard_gradients()
    file = tmp_path / "middle" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x00")
    refused(CheckpointError, "damaged", backend.load_state_with_optimizer(tmp_path / "middle"))
    manifest = tmp_path / "middle" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 99}))
    refused(CheckpointError, "format 99", backend.load_state(tmp_path / "middle"))
    assert distance(weights_of(backend), before) == 0.0


def test_operations_are_numbered_on(tmp_path: Path) -> None:
    """Weights alone bring no history: the next operation has the next number; everything brings its own."""
    backend, data = TorchBackend(TinyLM(), checkpoint_dir=tmp_path), make_data([5, 4])

    def numbers(times: int) -> list[int]:
        for _ in range(times):
            backend.forward_backward(data, "cross_entropy").result()
        return [entry.operation for entry in backend.optim_step(AdamParams(learning_rate=1e-3)).result().ledger]

    assert numbers(2) == [1, 2]
    path = backend.save_state("two").result().path
    assert numbers(1) == [3]
    backend.load_state(path).result()
    assert numbers(2) == [4, 5]
    backend.load_state_with_optimizer(path).result()
    assert numbers(1) == [3]
