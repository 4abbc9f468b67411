"""Log-probs of labels: those of the model's own logits, in value and gradient, without holding the logits of all tokens."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import AllocationTracker
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence

from pullback.backends import HFModel
from pullback.errors import ConfigError, ShapeError, UnsupportedError
from pullback.losses import CrossEntropy, TokenBatch
from pullback.ops import Head, logprobs_from_logits, logprobs_of
from pullback.ops.labels import _require_ids
from pullback.testing import random_llama
from pullback.testing.models.zoo import build

IDS = torch.tensor([[5, 9, 2, 7, 7, 1], [3, 3, 8, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
LABELS = torch.tensor([[-100, -100, 2, 7, 7, 1], [3, -100, 8, -100, -100, -100]])
COTANGENT = torch.tensor([[1.0, 2.0, -1.0, 0.5, 3.0], [1.0, -2.0, 1.0, 1.0, 1.0]])


def lora(model: Any, *targets: str) -> Any:
    """The model with adapters that are not zero."""
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=list(targets)))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_" in name:
                p.copy_(torch.linspace(-0.3, 0.3, p.numel()).view_as(p))
    return adapted.eval()


def named_scale(model: Any) -> Any:
    """The model with a scale in its config that it does not apply."""
    model.config.logits_scaling = 2.0
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: random_llama(vocab_size=64),
    "tied": lambda: random_llama(vocab_size=64, tie_word_embeddings=True),
    "softcap": lambda: build("gemma2").eval(),
    "scaled": lambda: build("granite", logits_scaling=4.0).eval(),
    "scaled before the head": lambda: build("minicpm3").eval(),
    "scaled by its config alone": lambda: named_scale(random_llama(vocab_size=64)),
    "biased": lambda: build("phi").eval(),
    "lora": lambda: lora(random_llama(vocab_size=64), "q_proj", "v_proj"),
    "lora on the head": lambda: lora(random_llama(vocab_size=64), "q_proj", "lm_head"),
}


def textbook(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """All log-softmaxes, gathered and masked."""
    logprobs = (logits[:, :-1].float() / temperature).log_softmax(-1)
    targets = LABELS[:, 1:]
    gathered = logprobs.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return torch.where(targets == -100, 0.0, gathered)


def gradients(model: Any, logprobs: Tensor) -> Tensor:
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad((logprobs * COTANGENT).sum(), parameters, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(found, parameters, strict=True)]
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_the_models_own(name: str, temperature: float) -> None:
    """Values and the gradient of every parameter, for tied, capped, scaled, biased and adapted heads."""
    model = MODELS[name]()
    ours = logprobs_of(model, IDS, LABELS, attention_mask=MASK, temperature=temperature)
    theirs = textbook(model(input_ids=IDS, attention_mask=MASK).logits, temperature)
    assert torch.equal(ours == 0, LABELS[:, 1:] == -100)
    assert torch.allclose(ours, theirs, rtol=2e-7, atol=2e-6)
    exact = gradients(model, theirs)
    assert (gradients(model, ours) - exact).norm() < 1e-5 * exact.norm()
    assert not model.get_output_embeddings()._forward_pre_hooks


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_what_a_trainer_wraps_around_takes_part(process_group: None) -> None:
    """Data parallelism sees the forward, so that its reduction of the gradients runs; autocast is the model's own."""
    model = random_llama(vocab_size=64)
    parallel = DistributedDataParallel(model)
    reduced: list[int] = []
    parallel.register_comm_hook(None, lambda _, bucket: counted(reduced, bucket))
    torch.autograd.backward((logprobs_of(parallel, IDS, LABELS, attention_mask=MASK) * COTANGENT).sum())
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert sum(reduced) == found.numel()
    exact = gradients(model, textbook(model(input_ids=IDS, attention_mask=MASK).logits))
    assert (found - exact).norm() < 1e-5 * exact.norm()
    with torch.autocast("cpu", torch.bfloat16):
        half = logprobs_of(random_llama(vocab_size=64), IDS, LABELS, attention_mask=MASK)
    whole = logprobs_of(model, IDS, LABELS, attention_mask=MASK)
    assert 0 < (half - whole).abs().max() < 0.05


@pytest.mark.parametrize("options", [{}, {"static_graph": True}, {"find_unused_parameters": True}], ids=str)
def test_data_parallelism_reduces_each_gradient(process_group: None, options: dict[str, Any]) -> None:
    """A static graph is reduced when the backward begins at the model's outputs, of which no log-prob is made."""
    parallel = DistributedDataParallel(random_llama(vocab_size=64), **options)
    reduced: list[int] = []
    parallel.register_comm_hook(None, lambda _, bucket: counted(reduced, bucket))
    for step in (1, 2):
        torch.autograd.backward(logprobs_of(parallel, IDS, LABELS).sum())
        assert sum(reduced) == step * sum(p.numel() for p in parallel.parameters())


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("reshard", [False, True])
def test_sharding_sees_the_backward(process_group: None, by_layer: bool, reshard: bool) -> None:
    """FSDP gathers what it let go after the forward, and reduces: else gradients lie on weights that no optimizer steps."""
    model = random_llama(vocab_size=64)
    model.lm_head.requires_grad_(False)
    exact = gradients(model, textbook(model(input_ids=IDS, attention_mask=MASK).logits))
    for layer in model.model.layers if by_layer else ():
        fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)), reshard_after_forward=reshard)
    for _ in range(2):
        model.zero_grad()
        torch.autograd.backward((logprobs_of(model, IDS, LABELS, attention_mask=MASK) * COTANGENT).sum())
        found = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(isinstance(g, DTensor) for g in found)
        assert (torch.cat([g.full_tensor().flatten() for g in found]) - exact).norm() < 1e-5 * exact.norm()


def counted(reduced: list[int], bucket: Any) -> Any:
    reduced.append(bucket.buffer().numel())
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


@pytest.mark.parametrize("frozen", [False, True])
def test_logits_are_never_held(frozen: bool) -> None:
    """The largest tensor is smaller than the logits of all tokens, forward and backward; the textbook's is not."""
    model = random_llama(vocab_size=30_000, hidden_size=16, num_attention_heads=2)
    model.lm_head.requires_grad_(not frozen)
    ids = torch.arange(240).view(2, 120)
    logits_bytes = 4 * ids.numel() * 30_000

    def largest(call: Callable[[], Tensor]) -> int:
        with AllocationTracker() as tracker:
            torch.autograd.backward(call().sum())
        found: int = tracker.largest
        return found

    assert largest(lambda: logprobs_of(model, ids, ids)) < 0.6 * logits_bytes
    assert largest(lambda: logprobs_from_logits(model(input_ids=ids).logits, ids)) > 0.9 * logits_bytes


def test_a_head_that_is_not_the_whole_story_is_refused() -> None:
    """A cap that the config names and the model does not apply; an auxiliary loss; an unknown model."""
    bounded = random_llama(vocab_size=64)
    bounded.config.final_logit_softcapping = 0.5
    with pytest.raises(UnsupportedError, match="not compute its logits as hidden states times a head"):
        logprobs_of(bounded, IDS, LABELS)
    mixture = random_llama(vocab_size=64)
    mixture.config.output_router_logits = True
    with pytest.raises(UnsupportedError, match="auxiliary loss"):
        logprobs_of(mixture, IDS, LABELS)
    with pytest.raises(UnsupportedError, match="asks for an auxiliary loss"):
        logprobs_of(mixture, IDS, LABELS, output_router_logits=True)
    with pytest.raises(UnsupportedError, match="no get_output_embeddings"):
        Head.of(torch.nn.Linear(2, 2))
    headless = random_llama(vocab_size=64)
    headless.lm_head = torch.nn.Identity()
    with pytest.raises(UnsupportedError, match="not a linear layer"):
        Head.of(headless)
    coded = copy.deepcopy(random_llama(vocab_size=64))
    coded.lm_head.weight = torch.nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UnsupportedError, match="quantized"):
        Head.of(coded)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean_token_mean"])
def test_a_row_of_several_sequences(aggregation: Any) -> None:
    """A padding-free row, cut by its lengths, is the batch of its sequences; without weights it is another loss."""
    model, lengths = random_llama(vocab_size=64).eval(), [4, 6, 3]
    sequences = torch.randint(64, (sum(lengths),), generator=torch.Generator().manual_seed(0)).split(lengths)
    row = torch.cat(sequences)[None]
    labels = torch.cat([torch.cat([torch.full((2,), -100), ids[2:]]) for ids in sequences])[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    logprobs = logprobs_of(model, row, labels, position_ids=positions)[0]
    cut = [lengths[0] - 1, *lengths[1:]]
    loss = CrossEntropy(aggregation)
    packed = loss.evaluate(TokenBatch.from_packed(logprobs, cut, weights=labels[0, 1:] != -100)).loss
    padded = pad_sequence(list(sequences), batch_first=True)
    wanted = pad_sequence(list(labels[0].split(lengths)), batch_first=True, padding_value=-100)
    apart = logprobs_of(model, padded, wanted, attention_mask=pad_sequence([torch.ones(n) for n in lengths], True))
    expected = loss.evaluate(TokenBatch.from_labels(apart, wanted)).loss
    assert (packed - expected).abs().item() < 1e-5
    assert (loss.evaluate(TokenBatch.from_packed(logprobs, cut)).loss - expected).abs().item() > 0.1


def test_models_that_score_a_token_elsewhere_are_refused() -> None:
    """A decoder's labels stand at its own positions, one further than a causal model's; a masked model reads what it scores."""
    transformers = pytest.importorskip("transformers")
    size = {"vocab_size": 64, "num_layers": 1, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": 2}
    seq2seq = transformers.T5ForConditionalGeneration(transformers.T5Config(**size, decoder_start_token_id=0))
    with pytest.raises(UnsupportedError, match="has an encoder and a decoder"):
        logprobs_of(seq2seq, IDS, LABELS, decoder_input_ids=IDS)
    with pytest.raises(UnsupportedError, match="has an encoder and a decoder"):
        HFModel(seq2seq)
    bert = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    with pytest.raises(UnsupportedError, match="reads the tokens that it scores"):
        logprobs_of(transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=64, **bert)), IDS, LABELS)


def test_bad_shapes_are_refused_before_the_forward() -> None:
    model: Any = None  # is not called
    with pytest.raises(ShapeError, match=r"labels must be int64 of the shape of input_ids"):
        logprobs_of(model, IDS, LABELS[:, 1:])
    with pytest.raises(ShapeError, match=r"labels must be int64 of the shape of input_ids"):
        logprobs_of(model, IDS[0], LABELS[0])
    lists: Any = IDS.tolist()
    with pytest.raises(ShapeError, match=r"input_ids must be an int64 tensor \[B, T\], got list"):
        logprobs_of(model, lists, LABELS)
    with pytest.raises(ShapeError, match=r"labels must be an int64 tensor \[B, T\], got list"):
        logprobs_of(model, IDS, lists)
    with pytest.raises(ConfigError, match="scores all of them"):
        logprobs_of(model, IDS, LABELS, logits_to_keep=2)
    with pytest.raises(ShapeError, match="one per position of the logits"):
        logprobs_from_logits(torch.zeros(2, 6, 4), LABELS[:, 1:])
    with pytest.raises(ShapeError, match="one per position of the logits"):
        logprobs_from_logits(torch.zeros(4), torch.tensor(1))


@given(st.integers(1, 3), st.integers(0, 5), st.booleans(), st.integers(0, 2**31))
def test_logprobs_from_logits(rows: int, length: int, shifted: bool, seed: int) -> None:
    """The textbook's log-softmax and its gradient, fp64; what is ignored has no effect, NaN or not."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, length, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(7, (rows, length), generator=generator)
    labels[torch.rand(rows, length, generator=generator) < 0.4] = -100
    targets, at = (labels, logits) if shifted else (labels[:, 1:], logits[:, : max(0, length - 1)])
    exact = at.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0].where(targets != -100, 0.0)
    slope = torch.nn.functional.one_hot(targets.clamp(min=0), 7) - at.softmax(-1)
    poisoned = logits.clone()
    poisoned[:, : at.shape[1]][targets == -100] = torch.nan
    leaf = poisoned.requires_grad_()
    found = logprobs_from_logits(leaf, labels, shifted=shifted)
    torch.autograd.backward(found.sum())
    assert leaf.grad is not None
    assert torch.allclose(found, exact, atol=1e-12)
    assert torch.equal(logprobs_from_logits(poisoned[0], labels[0], shifted=shifted), found[0])  # one sequence, [T, V]
    assert torch.allclose(leaf.grad[:, : at.shape[1]], slope * (targets != -100)[..., None], atol=1e-12)


@pytest.mark.parametrize("label", [-1, 64, -101])
def test_labels_that_are_no_tokens(label: int) -> None:
    """The first wrong one is named by its place, with what a label is; the last id of the vocabulary is one."""
    model, logits = random_llama(vocab_size=64), torch.zeros(2, 6, 64)
    words = f"label {label} at [1, 2]: a label is a token id"
    for shifted in (False, True):
        with pytest.raises(ShapeError, match=re.escape(words) + " below 64, .* what is not trained is -100"):
            logprobs_from_logits(logits, edited(label), shifted=shifted)
    with pytest.raises(ShapeError, match=re.escape(words) + ".* what is not trained is -100"):
        logprobs_of(model, IDS, edited(label))
    assert logprobs_of(model, IDS, edited(63)).shape == (2, 5)
    assert logprobs_from_logits(logits, edited(63)).shape == (2, 5)


def edited(label: int) -> Tensor:
    labels = LABELS.clone()
    labels[1, 2] = label
    return labels


def test_labels_below_none_are_refused_before_the_forward() -> None:
    model: Any = None  # is not called
    with pytest.raises(ShapeError, match=r"label -1 at \[1, 2\]: a label is a token id; what is not trained is -100"):
        logprobs_of(model, IDS, edited(-1))


def test_labels_are_looked_at_only_where_that_is_free() -> None:
    _require_ids(edited(-1).to("meta"), 64)  # of a device the answer would be waited for; this one has none
