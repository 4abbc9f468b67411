"""transformers and peft models: packed as alone, loaded from a folder, their own reference, refused where they do not fit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY, VOCAB, accumulate, cut, distance, make_data, sharing, tiny_llama
from tiers import sampled
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pullback.backends import AdamParams, TorchBackend, with_reference
from pullback.backends.native import HFModel
from pullback.backends.native.models import hf
from pullback.backends.native.models import packed_attention as attention
from pullback.errors import LeakyModelError, MissingReferenceError, UnsupportedError
from pullback.losses import DPO, GRPO, KL, Loss

LENGTHS = [3, 6, 2, 5, 7, 1, 4, 4, 6, 2, 3, 5, 2, 7]
HF_CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora": 2},
    "lora, checkpointed": {"lora": 2, "gradient_checkpointing": True},
}


@pytest.mark.parametrize("options", HF_CASES.values(), ids=HF_CASES.keys())
@pytest.mark.parametrize("loss", sampled([GRPO(kl=KL(beta=0.1)), DPO()], [DPO()]), ids=lambda loss: loss.name)
def test_packed_equals_single_on_transformers(options: dict[str, Any], loss: Loss) -> None:
    """A transformers model as shipped (its norms are fp32): packed, padded and alone agree to 1e-6, in any order."""
    data = make_data(LENGTHS)
    expected = accumulate(TorchBackend(tiny_llama(**options), layout="single"), loss, [data])
    for layout, budget in itertools.product(("packed", "padded"), (12, 4096)):
        backend = TorchBackend(tiny_llama(**options), layout=layout, token_budget=budget)  # type: ignore[arg-type]
        found = accumulate(backend, loss, cut(data, 2, [4, 0, 6, 1, 3, 2, 5]))
        assert distance(found, expected) < 1e-6


@pytest.mark.parametrize("options", HF_CASES.values(), ids=HF_CASES.keys())
def test_forked_equals_single_on_transformers(options: dict[str, Any]) -> None:
    """A shared prefix that runs once gives what each sequence gives alone, in any order, checkpointed too."""
    data = sharing([[9, 7], [5, 12, 8], [11, 6, 6, 7]])
    expected = accumulate(TorchBackend(tiny_llama(**options), layout="single"), GRPO(), [data])
    for order in ([0, 1, 2, 3, 4, 5, 6, 7, 8], [4, 8, 2, 0, 6, 1, 3, 7, 5]):
        backend = TorchBackend(tiny_llama(**options), layout="forked")
        assert distance(accumulate(backend, GRPO(), [[data[i] for i in order]]), expected) < 1e-6
    assert backend.plan(GRPO(), data).tokens < sum(len(d.model_input) for d in data)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
@pytest.mark.parametrize(
    "backend", [pytest.param("eager", marks=pytest.mark.slow), pytest.param("inductor", marks=pytest.mark.soak)]
)
def test_compiled_trunk(backend: str) -> None:
    """A compiled base model gives the same gradient, packed or alone, kept or run again; its parameters have their names.

    The norms of an fp64 Llama compute in fp32: from the gradient with fp64 norms this one is 1.4e-4 away, and inductor's,
    which sums in another order, 1.0e-4.
    """
    limit = 1e-6 if backend == "eager" else 2e-4
    data = make_data(LENGTHS[:4])
    plain = TorchBackend(tiny_llama(lora=2), layout="single")
    expected = accumulate(plain, DPO(), [data])
    model = tiny_llama(lora=2, compile=backend)
    assert set(model.state_dict()) == set(plain.model.state_dict())
    compiled = TorchBackend(model, layout="packed", token_budget=9, activation_budget=0)
    assert distance(accumulate(compiled, DPO(), [data]), expected) < limit
    compiled.discard_gradients()
    compiled.forward_backward_custom(data, DPO(aggregation="sum")).result()
    assert distance({k: g / 2 for k, g in compiled.gradients().items()}, expected) < limit


def test_running_positions_would_leak() -> None:
    """Negative control: positions that run on let packed sequences see each other."""
    model = tiny_llama()
    tokens = torch.tensor([[1, 5, 6, 7, 1, 9, 3, 4]])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    alone = model.hidden_states(tokens[:, 4:], positions[:, 4:])[0]
    packed = model.hidden_states(tokens, positions)[0, 4:]
    leaking = model.hidden_states(tokens, torch.arange(8)[None])[0, 4:]
    assert torch.allclose(packed, alone, atol=1e-6)
    assert not torch.allclose(leaking, alone, atol=1e-3)


def test_lengths_rolled_by_one_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: attention over segments that are off by one token is found when the model is loaded."""
    packed_inputs = attention.packed_inputs

    @contextmanager
    def rolled(positions: Tensor) -> Iterator[dict[str, Any]]:
        with packed_inputs(positions) as extra:
            first, *others = extra["segments"]
            second = replace(others[0], start=others[0].start + 1)
            yield {"segments": [replace(first, end=first.end + 1), second, *others[1:]]}

    model = tiny_llama()
    assert TorchBackend(model).plan("cross_entropy", make_data(LENGTHS)).layout == "packed"
    monkeypatch.setattr(hf, "packed_inputs", rolled)
    assert TorchBackend(model).plan("cross_entropy", make_data(LENGTHS)).layout == "padded"
    with pytest.raises(LeakyModelError, match="packed"):
        TorchBackend(model, layout="packed")


@pytest.mark.parametrize("window", [3, 100])
def test_sliding_window_keeps_its_mask(window: int) -> None:
    """A window shorter than a sequence is not lost by attending to segments."""
    import transformers

    config = transformers.MistralConfig(vocab_size=VOCAB, sliding_window=window, **TINY)
    torch.manual_seed(0)
    model = HFModel(transformers.MistralForCausalLM(config).double())
    data = make_data(LENGTHS)
    expected = accumulate(TorchBackend(model, layout="single"), DPO(), [data])
    model.zero_grad()
    packed = accumulate(TorchBackend(model, layout="packed"), DPO(), [data])
    assert distance(packed, expected) < 1e-6
    tokens = torch.arange(12)[None] % VOCAB
    eager = transformers.MistralForCausalLM(config).double()
    eager.load_state_dict(model.model.state_dict())
    eager.set_attn_implementation("eager")
    theirs = eager.model(input_ids=tokens)[0]
    positions = torch.tensor([[*range(6), *range(6)]])
    ours = model.hidden_states(tokens, positions)[:, :6]
    assert torch.allclose(ours, eager.model(input_ids=tokens[:, :6])[0], atol=1e-6)
    assert torch.allclose(model.hidden_states(tokens, torch.arange(12)[None]), theirs, atol=1e-6)


@pytest.mark.parametrize("lora", [None, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_from_pretrained(lora: int | None, dtype: str, tmp_path: Path) -> None:
    """A folder of weights is loaded in the asked dtype, with or without LoRA, and trains; adapters are fp32."""
    causal: Any = tiny_llama(torch.float32).model
    causal.save_pretrained(tmp_path)
    backend = TorchBackend.from_pretrained(tmp_path, lora=lora, dtype=dtype, device="cpu", gradient_checkpointing=True)
    trained = {p.dtype for p in backend.model.parameters() if p.requires_grad}
    assert trained == {torch.float32 if lora else getattr(torch, dtype)}
    assert backend.tokenizer is None
    losses = []
    for _ in range(4):
        losses.append(backend.forward_backward(make_data(LENGTHS), "cross_entropy").result().metrics["loss:sum"])
        backend.optim_step(AdamParams(learning_rate=2e-2), "num_loss_tokens").result()
    assert losses[-1] < losses[0]


def test_reference_of_lora_is_the_base() -> None:
    """The adapter off is the base model: its log-probs, and at a fresh adapter DPO's loss is log 2 with ties."""
    data = make_data([4, 3, 5, 2])
    adapted = TorchBackend(tiny_llama(torch.float32, lora=2))
    base = TorchBackend(tiny_llama(torch.float32)).forward(data).result().loss_fn_outputs
    scored = with_reference(data, adapted.reference())
    for datum, output in zip(scored, base, strict=True):
        assert torch.allclose(datum.loss_fn_inputs["ref_logprobs"].to_torch(), output["logprobs"].to_torch(), atol=1e-6)
    own = adapted.forward(data).result().loss_fn_outputs
    same = [d.with_inputs(ref_logprobs=o["logprobs"]) for d, o in zip(data, own, strict=True)]
    metrics = adapted.forward_backward(same, "dpo").result().metrics
    assert abs(metrics["loss_per_unit:mean"] - 0.6931472) < 1e-6
    assert abs(metrics["accuracy:mean"] - 0.5) <= 0.5
    with pytest.raises(MissingReferenceError, match="reference="):
        TorchBackend(tiny_llama(torch.float32)).reference()
    missing = [d.with_inputs() for d in make_data([4, 3])]
    bare = [type(d)(d.model_input, {k: v for k, v in d.loss_fn_inputs.items() if k != "ref_logprobs"}) for d in missing]
    plan = TorchBackend(tiny_llama(torch.float32)).plan("dpo", bare)
    assert plan.route == "refuse"
    assert "missing required field 'ref_logprobs'" in plan.reason
    assert "reference=" in plan.reason


@pytest.mark.parametrize("lora", [None, 2])
def test_checkpointing_recomputes(lora: int | None) -> None:
    """With gradient checkpointing the layers run twice: the option does something, and the gradient is the same."""
    counts, gradients = [], []
    for checkpointing in (False, True):
        backend = TorchBackend(tiny_llama(lora=lora, gradient_checkpointing=checkpointing))
        with FlopCounterMode(display=False) as counter:
            gradients.append(accumulate(backend, GRPO(), [make_data([5, 4])]))
        counts.append(counter.get_total_flops())
    assert counts[1] > 1.2 * counts[0]
    assert distance(*gradients) < 1e-12


def test_dropout_is_off() -> None:
    """An adapter's dropout, which would make policy and reference different functions, is refused; without it nothing drops."""
    import peft

    settings = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    with pytest.raises(UnsupportedError, match=r"lora_dropout=0\.5.*set lora_dropout=0"):
        tiny_llama(lora=peft.LoraConfig(**settings, lora_dropout=0.5))
    data = make_data([5, 4])
    lora = peft.LoraConfig(**settings)
    grads = [accumulate(TorchBackend(tiny_llama(lora=lora, gradient_checkpointing=True)), GRPO(), [data]) for _ in "ab"]
    assert distance(*grads) == 0.0
    model = tiny_llama(lora=lora)  # negative control: what is refused drops out when it trains
    for name, module in model.named_modules():
        if name.endswith("lora_dropout"):
            module.add_module("default", torch.nn.Dropout(0.5))
    model.train()
    tokens, positions = torch.arange(6)[None], torch.arange(6)[None]
    assert not torch.equal(model.hidden_states(tokens, positions), model.hidden_states(tokens, positions))


def test_models_that_do_not_fit_are_refused() -> None:
    """Virtual tokens, an auxiliary loss, and logits that are no hidden states times a head."""
    import peft
    import transformers

    causal: Any = tiny_llama(torch.float32).model
    prompts = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(UnsupportedError, match="virtual tokens"):
        HFModel(peft.get_peft_model(causal, prompts))
    causal = tiny_llama(torch.float32).model
    causal.config.output_router_logits = True
    with pytest.raises(UnsupportedError, match="auxiliary loss"):
        HFModel(causal)
    causal = tiny_llama(torch.float32).model
    causal.config.final_logit_softcapping = 0.01
    with pytest.raises(UnsupportedError, match="adapter with hidden_states and head"):
        HFModel(causal)
    capped = transformers.Gemma2Config(
        **TINY,
        vocab_size=VOCAB,
        head_dim=8,
        final_logit_softcapping=0.5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    assert HFModel(transformers.Gemma2ForCausalLM(capped)).head().softcap == 0.5
