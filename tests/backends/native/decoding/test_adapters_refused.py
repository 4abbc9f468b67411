"""Which adapters may be decoded with their base's other rows; all others keep a batch of their own."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

pytest.importorskip("peft", reason="adapters are peft's (extra hf)")

import peft
from pretrained.adapters import adapted, rank

from pullback.backends import SamplingParams
from pullback.backends.native import HFModel
from pullback.backends.native.decoding import agreement, row_adapters
from pullback.backends.native.decoding.batch import ContinuousBatch
from pullback.datums import ModelInput
from pullback.errors import BackendError
from pullback.testing import TinyLM
from pullback.testing.models import zoo

TRAINED_HEAD = {"modules_to_save": ["lm_head"]}
REFUSED: dict[str, tuple[str, Any, str]] = {  # model type, adapter, what is said
    "adapter on the head": ("llama", rank(2, "q_proj", "lm_head"), "on its output projection"),
    "trained head": ("llama", rank(2, "q_proj", **TRAINED_HEAD), "lm_head.original_module.weight is not its base's"),
    "DoRA": ("llama", rank(2, "q_proj", use_dora=True), "no low-rank product on model.layers.0.self_attn.q_proj"),
    "bias of its own": ("llama", rank(2, "q_proj", lora_bias=True), "lora_B.default.bias is not its base's"),
    "IA3": ("llama", peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "no low-rank product"),
    "experts": ("mixtral", 2, "(ParamWrapper)"),
    "layers that know no rows": ("opt", 2, "a layer is given [12, 32], not the 2 rows"),
    "no cache": ("qwen3_next", rank(2, "q_proj"), "without a cache"),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_low_rank_product_by_rows_is_refused(case: str, caplog: pytest.LogCaptureFixture) -> None:
    """And the reason is logged; a plain adapter on the same base is taken wherever rows can be told apart."""
    kind, lora, words = REFUSED[case]
    base = zoo.build(kind, **({"tie_word_embeddings": False} if kind == "llama" else {}))
    batch = ContinuousBatch(adapted(base, None))
    with caplog.at_level(logging.INFO, logger=agreement.__name__):
        assert not batch.accepts(adapted(base, lora))
    assert words in caplog.text
    assert kind != "llama" or batch.accepts(adapted(base, 2))


@pytest.mark.slow
def test_other_weights_are_refused() -> None:
    """Another base, equal weights that are other tensors, a model without an adapter, and one that is not transformers'."""
    base, same, other = (zoo.build("llama", seed=seed) for seed in (0, 0, 1))
    batch = ContinuousBatch(adapted(base, None))
    for model in (adapted(other, 2), adapted(same, 2), adapted(same, None), TinyLM()):
        assert not batch.accepts(model)
        with pytest.raises(BackendError, match="one model and adapters of it"):
            batch.add(ModelInput.from_ints([1]), 1, SamplingParams(max_tokens=1), 0, model=model)
    assert batch.accepts(adapted(base, 2))
    tiny = TinyLM()
    assert ContinuousBatch(tiny).accepts(tiny)
    assert not ContinuousBatch(tiny).accepts(adapted(base, 2))


MISTAKES = {
    "the next row's adapter": lambda product: product.roll(1, 0),
    "no adapter": lambda product: 0 * product,
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_forward_that_mixes_rows_up_is_noticed(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: what gives rows another adapter's product is found before anything is decoded so."""
    base = zoo.build("llama")
    assert ContinuousBatch(adapted(base, None)).accepts(adapted(base, 2))
    right = row_adapters._Pieces.product
    monkeypatch.setattr(row_adapters._Pieces, "product", lambda *given: MISTAKES[mistake](right(*given)))
    assert not ContinuousBatch(adapted(base, None)).accepts(adapted(base, 2))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_are_tried_once(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all adapters on the same layers, of any rank; trying leaves no trace on the weights and the layers."""
    tried: list[HFModel] = []
    right = agreement._tried

    def noted(model: HFModel, models: Any) -> Any:
        tried.append(models[0])
        return right(model, models)

    monkeypatch.setattr(agreement, "_tried", noted)
    base = zoo.build("llama").to(dtype)
    batch, models = ContinuousBatch(adapted(base, None)), [adapted(base, rank(r)) for r in (2, 2, 7)]
    models.append(adapted(base, rank(2, "q_proj")))
    before = [[p.clone() for p in model.parameters()] for model in models]
    assert all(batch.accepts(model) for model in models * 2)
    assert tried[1:] == [models[0], models[3]]  # the first one tries the cache
    for model, kept in zip(models, before, strict=True):
        assert all(map(torch.equal, model.parameters(), kept))
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert not any(module._forward_hooks for module in batch._model.modules())  # type: ignore[attr-defined]
