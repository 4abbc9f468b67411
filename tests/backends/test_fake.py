"""The fake backend: closed forms are autograd's, faults come where they are scripted, samples are the table's."""

from __future__ import annotations

import pytest
import torch
from helpers import distance, make_data, tiny_backend

import pullback
from pullback.backends import (
    AdamParams,
    FakeBackend,
    Rollout,
    SamplingParams,
)
from pullback.datums import Datum, ModelInput
from pullback.losses import get_loss

DATA = make_data([5, 3, 7, 4])


@pytest.mark.parametrize("loss", ["cross_entropy", "ppo", "grpo", "dpo", "orpo"])
def test_closed_forms_are_autograds(loss: str) -> None:
    """The fake's gradient and step are those of autograd and of torch.optim.AdamW on the same table."""
    fake, table = FakeBackend(), torch.nn.Parameter(FakeBackend().table)
    adamw = torch.optim.AdamW([table], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for _ in range(3):
        fake.forward_backward(DATA, loss).result()
        rows = [table.log_softmax(-1)[d.model_input.tokens] for d in DATA]
        targets = [d.loss_fn_inputs["target_tokens"].to_torch() for d in DATA]
        logprobs = [r.gather(-1, t[:, None])[:, 0] for r, t in zip(rows, targets, strict=True)]
        value, _ = get_loss(loss)(DATA, logprobs)
        (table.grad,) = torch.autograd.grad(value, table)
        assert distance(fake.gradients(), {"table": table.grad}) < 1e-12
        torch.nn.utils.clip_grad_norm_([table], 0.5)
        adamw.step()
        fake.optim_step(AdamParams(1e-2, 0.9, 0.95, 1e-8, 0.1, grad_clip_norm=0.5)).result()
        assert distance({"table": fake.table}, {"table": table}) < 1e-12


def test_candidates_on_a_table() -> None:
    """[T, K] targets have the gradient of all their candidates."""
    data = [
        Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [[3, 4], [5, 5]], "weights": [[0.25, 0.75], [0.5, 0.0]]})
    ]
    fake, table = FakeBackend(), torch.nn.Parameter(FakeBackend().table)
    fake.forward_backward(data, "cross_entropy").result()
    rows = table.log_softmax(-1)
    (expected,) = torch.autograd.grad(-(0.25 * rows[1, 3] + 0.75 * rows[1, 4] + 0.5 * rows[2, 5]), table)
    assert distance(fake.gradients(), {"table": expected}) < 1e-12


def test_scripted_faults_and_written_calls() -> None:
    """A fault replaces its operation and fails the accumulation; `calls` records every call."""
    fake = FakeBackend(faults={2: TimeoutError("lost on the way")})
    fake.forward_backward(DATA, "dpo").result()
    lost = fake.forward_backward(DATA, "dpo")
    with pytest.raises(pullback.errors.PrecedingOperationFailed, match="lost on the way"):
        fake.optim_step(AdamParams()).result()
    with pytest.raises(TimeoutError):
        lost.result()
    assert fake.optim_step(AdamParams()).result().normalization == "pairs over 1 call"
    assert [(c.operation, c.name, c.datums) for c in fake.calls[:3]] == [
        ("forward_backward", "dpo", 4),
        ("forward_backward", "dpo", 4),
        ("optim_step", "", 0),
    ]
    fake.close()


def test_samples_of_a_table() -> None:
    """Samples end at stop tokens, carry the untempered log-probs, and repeat with a seed; the reference stays."""
    fake = FakeBackend(stop=[3])
    params = SamplingParams(max_tokens=30, temperature=0.7, seed=5)
    prompts = [ModelInput.from_ints([1, 2]), ModelInput.from_ints([4])]
    rollouts: list[Rollout] = fake.sample(prompts, 2, params).result()
    assert rollouts == fake.sample(prompts, 2, params).result()
    assert [r.prompt_index for r in rollouts] == [0, 0, 1, 1]
    for r in rollouts:
        assert (r.stop_reason == "stop") == (r.tokens[-1] == 3)
        before = [prompts[r.prompt_index].to_ints()[-1], *r.tokens[:-1]]
        expected = fake.table.log_softmax(-1)[before, r.tokens]
        assert r.logprobs == pytest.approx(expected.tolist())
    reference = fake.reference().forward(DATA).result()
    fake.forward_backward(DATA, "dpo").result()
    fake.optim_step(AdamParams(0.1)).result()
    assert fake.reference().forward(DATA).result() == reference
    assert fake.forward(DATA).result() != reference


def test_native_and_fake_say_the_same_of_a_step() -> None:
    """Both report the divisor in the same words."""
    normalizations = []
    for backend in (tiny_backend(), FakeBackend()):
        backend.forward_backward(DATA[:2], "dpo").result()
        backend.forward_backward(DATA[2:], "dpo").result()
        normalizations.append(backend.optim_step(AdamParams()).result().normalization)
    assert normalizations[0] == normalizations[1] == "pairs over 2 calls"
