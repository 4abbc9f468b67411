"""Sampling: its log-probs are those of forward, its distribution is the model's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import distance, make_data, tiny_backend, tiny_llama

from pullback.backends import SamplingParams, TorchBackend
from pullback.datums import ModelInput, datum_from_prompt_completion
from pullback.errors import DatumError, InvalidDatumsError

PROMPTS = [ModelInput.from_ints(p) for p in ([5, 6, 7], [5], [8, 9, 10, 11, 3])]
MAKERS: dict[str, Any] = {
    "plain": tiny_backend,
    "cached": lambda: TorchBackend(tiny_llama()),
    "cached, LoRA": lambda: TorchBackend(tiny_llama(lora=2)),
    "cached, checkpointed": lambda: TorchBackend(tiny_llama(lora=2, gradient_checkpointing=True)),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
@pytest.mark.parametrize("how", [{}, {"temperature": 0.5, "top_k": 5}, {"top_p": 0.7}, {"temperature": 0.0}])
def test_logprobs_are_those_of_forward(make: Any, how: dict[str, Any]) -> None:
    """Whatever the temperature, the log-probs are the untempered policy's; prompts of mixed length do not matter."""
    backend = make()
    params = SamplingParams(max_tokens=7, seed=1, stop=[2, 4], **how)
    rollouts = backend.sample(PROMPTS, 3, params).result()
    assert [r.prompt_index for r in rollouts] == [0] * 3 + [1] * 3 + [2] * 3
    data = [datum_from_prompt_completion(PROMPTS[r.prompt_index].tokens, r.tokens) for r in rollouts]
    outputs = backend.forward(data).result().loss_fn_outputs
    for r, output in zip(rollouts, outputs, strict=True):
        scored = output["logprobs"].to_torch()[-len(r.tokens) :]
        assert torch.allclose(scored, torch.tensor(r.logprobs), atol=1e-5)
        assert (r.stop_reason == "stop") == (r.tokens[-1] in (2, 4))
        assert not set(r.tokens[:-1]) & {2, 4}
    again = backend.sample(PROMPTS, 3, params).result()
    assert [r.tokens for r in again] == [r.tokens for r in rollouts]


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_greedy_is_the_argmax(make: Any) -> None:
    """Temperature 0 takes the most probable token at every step."""
    backend = make()
    (greedy,) = backend.sample(PROMPTS[:1], 1, SamplingParams(max_tokens=4, temperature=0.0, stop=[])).result()
    tokens = PROMPTS[0].to_ints()
    for token in greedy.tokens:
        candidates = [datum_from_prompt_completion(tokens, [k]) for k in range(backend.vocab_size)]
        outputs = backend.forward(candidates).result().loss_fn_outputs
        assert max(range(len(outputs)), key=lambda k: outputs[k]["logprobs"].data[-1]) == token
        tokens.append(token)


def test_distribution() -> None:
    """Sampled frequencies fit the model's probabilities (chi-square, fixed seed), and not those of another prompt."""
    backend, count = tiny_backend(), 2000
    drawn = backend.sample(PROMPTS[:1], count, SamplingParams(max_tokens=1, seed=3)).result()
    observed = torch.bincount(torch.tensor([r.tokens[0] for r in drawn]), minlength=backend.vocab_size).double()

    def chi_square(prompt: ModelInput) -> float:
        candidates = [datum_from_prompt_completion(prompt.tokens, [k]) for k in range(backend.vocab_size)]
        outputs = backend.forward(candidates).result().loss_fn_outputs
        expected = count * torch.tensor([o["logprobs"].data[-1] for o in outputs]).double().exp()
        return float(((observed - expected).square() / expected).sum())

    assert chi_square(PROMPTS[0]) < 45  # 16 degrees of freedom: p < 1e-4 beyond
    assert chi_square(PROMPTS[1]) > 100


def test_sampling_leaves_the_window_alone() -> None:
    """Sampling in the middle of accumulation changes no gradient."""
    backend = tiny_backend()
    backend.forward_backward(make_data([3, 4]), "ppo").result()
    before = backend.gradients()
    backend.sample(PROMPTS, 2, SamplingParams(max_tokens=3)).result()
    assert distance(backend.gradients(), before) == 0.0


def test_bad_prompts() -> None:
    """Every bad prompt is named."""
    backend = tiny_backend()
    with pytest.raises(InvalidDatumsError, match=r"prompt 0: is empty[\s\S]*prompt 1: has token ids"):
        backend.sample([ModelInput.empty(), ModelInput.from_ints([99])], 1, SamplingParams()).result()
    with pytest.raises(DatumError, match="at least 1"):
        backend.sample(PROMPTS, 0, SamplingParams()).result()
