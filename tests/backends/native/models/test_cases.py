"""Set-ups that once gave a number that was not the model's: now the right one, or a refusal in words."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from pretrained.own_model import largest_error, own_logprobs, sharing_prompt
from torch import Tensor
from torch.nn.functional import dropout

pytest.importorskip("transformers", reason="the architectures are transformers' (extra hf)")
pytest.importorskip("peft", reason="adapters are peft's (extra hf)")

import peft

from pullback.backends import AdamParams, SamplingParams, TorchBackend, with_reference
from pullback.backends.native import HFModel
from pullback.backends.native.models import hf
from pullback.datums import Datum, ModelInput, preference_pair
from pullback.errors import InvalidDatumsError, MissingReferenceError, UnsupportedError
from pullback.testing.models import zoo
from pullback.testing.models.llama import random_llama

WINDOW = 8
ADVANTAGES = (1.0, -1.0, 0.5, -0.5)


def group(plain: Any) -> list[Datum]:
    """Four answers to a prompt longer than the window, drawn by the model itself."""
    data = sharing_prompt(30, (6, 6, 6, 6))
    with torch.no_grad():
        own = [own_logprobs(plain, datum) for datum in data]
    return [
        d.with_inputs(logprobs=x, advantages=torch.full((len(x),), a))
        for d, x, a in zip(data, own, ADVANTAGES, strict=True)
    ]


@pytest.mark.parametrize("name", ["mistral", "gemma3_text"])
@pytest.mark.parametrize("layout", ["auto", "packed"])
def test_grpo_beyond_a_window(name: str, layout: Any) -> None:
    """On-policy the ratio is 1, and the gradient is that of the advantages, though the group shares a long prompt."""
    model, plain = (zoo.build(name, window=WINDOW) for _ in range(2))
    backend, data = TorchBackend(HFModel(model), layout=layout), group(plain.eval())
    metrics = backend.forward_backward(data, "grpo").result().metrics
    assert metrics["ratio:mean"] == pytest.approx(1.0, abs=1e-5)
    found = backend.gradients()
    weights = [d.loss_fn_inputs["weights"].to_torch() for d in data]
    losses = [-(own_logprobs(plain, d) * w).sum() * a for d, w, a in zip(data, weights, ADVANTAGES, strict=True)]
    torch.stack(losses).sum().backward()
    own = {f"model.{n}": p.grad for n, p in plain.named_parameters() if p.grad is not None}
    assert cosine(found, own) == pytest.approx(1.0, abs=1e-6)
    assert cosine(found, {n: g.abs() for n, g in own.items()}) < 0.9  # negative control


def cosine(found: dict[str, Tensor], own: dict[str, Tensor]) -> float:
    """Cosine of two gradients."""
    a, b = (torch.cat([x[n].flatten().double() for n in sorted(found.keys() & own.keys())]) for x in (found, own))
    return float(a @ b / a.norm() / b.norm())


@pytest.mark.parametrize("window", [4, 64])
@pytest.mark.parametrize("layout", ["auto", "packed", "padded", "single"])
def test_a_pair_of_one_and_a_half_windows(window: int, layout: Any) -> None:
    """Every layout gives the model's own log-probs of two responses to a prompt as long as the window."""
    model, plain = (zoo.build("mistral", window=window) for _ in range(2))
    backend = TorchBackend(HFModel(model), layout=layout)
    data = sharing_prompt(window, (window // 2, window // 2), seed=1)
    assert backend.plan("cross_entropy", data).layout == ("forked" if layout == "auto" else layout)
    assert largest_error(backend, plain.eval(), data) < 1e-5
    assert largest_error(backend, zoo.build("mistral", window=2 * window).eval(), data) > 1e-3  # negative control


@pytest.mark.parametrize("lora", [True, False])
def test_steps_under_one_autocast(lora: bool) -> None:
    """A step under autocast is seen by the next call, though autocast keeps casts of the weights."""
    data = sharing_prompt(6, (5, 3))
    each, around = (losses(data, lora, around) for around in (False, True))
    assert around == each
    assert each[3] < each[0]  # negative control: the steps do something


def losses(data: list[Datum], lora: bool, around: bool) -> list[float]:
    """Losses of four steps, under one autocast or under one for each call."""
    torch.manual_seed(0)
    model = zoo.build("llama")
    if lora:
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    backend, found = TorchBackend(HFModel(model)), []
    with torch.autocast("cpu", torch.bfloat16) if around else nullcontext():
        for _ in range(4):
            with nullcontext() if around else torch.autocast("cpu", torch.bfloat16):
                found.append(float(backend.forward_backward(data, "cross_entropy").result().metrics["loss:sum"]))
            backend.optim_step(AdamParams(learning_rate=1e-2)).result()
    return found


@pytest.mark.parametrize("start", [True, "pissa", "olora"])
@pytest.mark.filterwarnings("ignore")
def test_adapter_off_is_the_reference_or_refused(start: Any) -> None:
    """At step 0 DPO is log 2; an adapter whose start changes the base has no reference in it."""
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=start)
    backend = TorchBackend(HFModel(peft.get_peft_model(zoo.build("llama"), config)))
    pairs = [*preference_pair([1, 2, 3], [4, 5, 6], [7, 8]), *preference_pair([1, 9], [4, 5], [3, 3, 3])]
    if start is True:
        data = with_reference(pairs, backend.reference())
        metrics = backend.forward_backward(data, "dpo", {"beta": 0.1}).result().metrics
        assert metrics["loss_per_unit:mean"] == pytest.approx(0.693147, abs=1e-5)
        return
    with pytest.raises(MissingReferenceError, match=f"init_lora_weights='{start}', which changes the base"):
        with_reference(pairs, backend.reference())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_three_losses_are_one(checkpointing: bool) -> None:
    """Recomputed layers that drop out by themselves do not; control: in training mode they do."""
    model = HFModel(zoo.build("opt", dropout=0.1), gradient_checkpointing=checkpointing)
    backend, data = TorchBackend(model), sharing_prompt(17, (30,))
    forward = backend.forward(data).result().metrics["nll:mean"]
    found = {backend.forward_backward(data, "cross_entropy").result().metrics["nll:mean"] for _ in range(3)}
    assert len(found) == 1
    assert found.pop() == pytest.approx(forward, rel=1e-6)
    tokens = data[0].model_input.tokens[None]
    model.train()
    assert not torch.equal(model.model(input_ids=tokens).logits, model.model(input_ids=tokens).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_soft_cap_of_another_name_is_refused(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the weights, even those at which no logit comes near the cap."""
    model = zoo.build("recurrent_gemma", window=WINDOW, initializer_range=0.02).to(dtype)
    for gain in (1e-3, 8e3):
        with torch.no_grad():
            model.lm_head.weight.mul_(gain)
        with pytest.raises(UnsupportedError, match="does not compute its logits as hidden states times a head"):
            HFModel(model)
    monkeypatch.setattr(hf, "distance_to_own", lambda *_: 0.0)  # negative control: nothing else refuses it
    HFModel(model)


def test_dropout_in_evaluation_is_named_as_such() -> None:
    """Whatever it drops; a head that is applied otherwise, as above, has another name."""
    model = random_llama(vocab_size=64, hidden_size=32)  # its logits are small beside those that a bound would show at
    model.model.layers[0].mlp.register_forward_hook(lambda module, given, out: dropout(out, 0.1))
    for seed in range(20):
        torch.manual_seed(seed)
        with pytest.raises(UnsupportedError, match="gives other logits each time"):
            HFModel(model)


def test_a_hybrid_model_samples() -> None:
    """A cache that cannot be copied is not used: a convolution's layer samples, and its log-probs are the model's own."""
    model, plain = (zoo.build("lfm2", layer_types=["conv", "full_attention"]) for _ in range(2))
    prompt = ModelInput.from_ints([3, 4])
    (one,) = TorchBackend(HFModel(model)).sample([prompt], 1, SamplingParams(max_tokens=4, seed=0, stop=[])).result()
    tokens = torch.tensor([[3, 4, *one.tokens]])
    with torch.no_grad():
        own = plain.eval()(input_ids=tokens, use_cache=False).logits[0].log_softmax(-1)[1:-1]
    expected = own.gather(-1, tokens[0, 2:, None])[:, 0]
    assert torch.allclose(torch.tensor(one.logprobs), expected, atol=1e-5)
    assert not torch.allclose(torch.tensor(one.logprobs).roll(1), expected, atol=1e-5)  # negative control


@pytest.mark.parametrize(("name", "field"), [("gpt2", "n_positions"), ("llama", "max_position_embeddings")])
def test_beyond_the_context(name: str, field: str) -> None:
    """Texts and completions beyond the context are refused before anything is computed; those within are not."""
    backend = TorchBackend(HFModel(zoo.build(name, **{field: 16})))
    with pytest.raises(InvalidDatumsError, match="19 tokens, more than max_length 16"):
        backend.forward_backward(sharing_prompt(15, (5,)), "cross_entropy").result()
    with pytest.raises(InvalidDatumsError, match="leave the model's context of 16 tokens"):
        backend.sample([ModelInput.from_ints(range(10))], 1, SamplingParams(max_tokens=20, stop=[], seed=0)).result()
    assert backend.forward(sharing_prompt(12, (5,))).exception() is None
