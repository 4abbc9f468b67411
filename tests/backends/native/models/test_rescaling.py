"""RWKV divides weights in place for evaluation; it is trained, scored and saved as the model that was loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import unweighted_nll

pytest.importorskip("transformers", reason="the architectures are transformers' (extra hf)")

import transformers
from pretrained.own_model import sharing_prompt
from torch import Tensor

from pullback.backends import AdamParams, TorchBackend
from pullback.backends.native import HFModel
from pullback.backends.native.models.facts import rescaling
from pullback.errors import UnsupportedError
from pullback.testing.modelcheck.layouts import using_layout
from pullback.testing.models import zoo


def rwkv() -> Any:
    """Of five layers, which are divided by 1, 1, 2, 2 and 4."""
    return zoo.build("rwkv", num_hidden_layers=5, rescale_every=2)


def own(model: Any, data: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Log-probs of a model in training mode, where nothing is divided, and the gradient of their sum, by autograd."""
    model.train().zero_grad()
    found = []
    for datum in data:
        logits = model(input_ids=datum.model_input.tokens[None], use_cache=False).logits[0].log_softmax(-1)
        found.append(logits.gather(-1, datum.loss_fn_inputs["target_tokens"].to_torch()[:, None])[:, 0])
    unweighted_nll(data, found)[0].backward()
    return [x.detach() for x in found], {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def gap(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The relative difference of two gradients; zero where one has nothing."""
    zero = torch.zeros(())
    pairs = [(found.get(n, zero).double(), expected.get(n, zero).double()) for n in found.keys() | expected.keys()]
    off, size = (
        sum(float(x.square().sum()) for x in each) for each in ([a - b for a, b in pairs], [b for _, b in pairs])
    )
    return float((off / size) ** 0.5)


@pytest.mark.parametrize(
    ("prompt", "has_run"),
    [(1, False), (8, True), *(pytest.param(n, False, marks=pytest.mark.slow) for n in (40, 200))],
)
def test_logprobs_and_gradients(prompt: int, has_run: bool) -> None:
    """They are those of the weights as they were loaded, in every layout; also where the model had run before."""
    model = rwkv()
    if has_run:
        model.eval()(input_ids=torch.arange(4)[None])
        assert model.rwkv.layers_are_rescaled
    backend, data = TorchBackend(HFModel(model)), sharing_prompt(prompt, (5, 9, 2))
    assert backend.layouts() == ("padded", "single")  # a state runs on from one sequence of a row to the next
    expected, slopes = own(rwkv(), data)
    for layout in backend.layouts():
        with using_layout(backend, layout):
            found = [o["logprobs"].to_torch() for o in backend.forward(data).result().loss_fn_outputs]
            backend.forward_backward_custom(data, unweighted_nll).result()
        gradients = {n.removeprefix("model."): g for n, g in backend.gradients().items()}
        backend.discard_gradients()
        assert max(float((x - y).abs().max()) for x, y in zip(found, expected, strict=True)) < 1e-5
        assert gap(gradients, slopes) < 1e-5


def test_what_is_saved_is_what_was_trained(tmp_path: Path) -> None:
    """Nothing changes the weights but steps, and an export has them."""
    model, before = rwkv(), rwkv().state_dict()
    backend, data = TorchBackend(HFModel(model)), sharing_prompt(6, (5, 3))
    backend.forward(data).result()
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    backend.forward_backward(data, "cross_entropy").result()
    backend.optim_step(AdamParams(learning_rate=1e-3)).result()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(backend.export(tmp_path / "out").result().path)
    found = [o["logprobs"].to_torch() for o in backend.forward(data).result().loss_fn_outputs]
    assert max(float((x - y).abs().max()) for x, y in zip(found, own(loaded, data)[0], strict=True)) < 1e-5


def test_without_the_mend_the_weights_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: evaluation divides them, and the gradient is that of others."""
    monkeypatch.setattr("pullback.backends.native.models.hf.keep_unscaled", lambda base, quantized: None)
    model, data = rwkv(), sharing_prompt(6, (5, 3))
    backend = TorchBackend(HFModel(model))
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), rwkv().parameters(), strict=True))
    backend.forward_backward_custom(data, unweighted_nll).result()
    gradients = {n.removeprefix("model."): g for n, g in backend.gradients().items()}
    assert gap(gradients, own(rwkv(), data)[1]) > 1e-4


def test_divided_codes_are_refused() -> None:
    """Quantised weights that have been divided cannot be multiplied again."""
    model = rwkv().eval()
    rescaling.keep_unscaled(model.rwkv, quantized=True)  # they have not
    model = rwkv().eval()
    model(input_ids=torch.arange(4)[None])
    with pytest.raises(UnsupportedError, match=r"RwkvModel has run in evaluation mode.*load it anew"):
        rescaling.keep_unscaled(model.rwkv, quantized=True)
