"""Recomputed layers: in evaluation mode, whatever a layer drops out by itself, and in a copy of the model its own."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers", reason="the layers are transformers' own (extra hf)")

from pretrained.own_model import sharing_prompt

from pullback.backends import TorchBackend
from pullback.backends.native import HFModel
from pullback.testing.models import zoo


@pytest.mark.parametrize("name", ["opt", "xglm", "bart"])
def test_dropout_of_a_layer_stays_off(name: str) -> None:
    """Loss and gradient with recomputed layers are those without, to the bit or nearly, and the same each time."""
    data = sharing_prompt(6, (5, 3, 4))
    gradients, losses = [], []
    for checkpointing in (False, True, True):
        model = HFModel(zoo.build(name, dropout=0.3, attention_dropout=0.3), gradient_checkpointing=checkpointing)
        backend = TorchBackend(model)
        losses.append(backend.forward_backward(data, "cross_entropy").result().metrics["loss:sum"])
        gradients.append(torch.cat([g.flatten() for g in backend.gradients().values()]))
    assert losses[1] == losses[2] == pytest.approx(losses[0], rel=1e-6)
    assert float((gradients[1] - gradients[0]).norm() / gradients[0].norm()) < 1e-6
    model.train()  # negative control: in training mode these models do drop out
    with torch.no_grad():
        tokens = data[0].model_input.tokens[None]
        assert not torch.equal(model.model(input_ids=tokens).logits, model.model(input_ids=tokens).logits)


def test_a_copy_runs_its_own_layers() -> None:
    """A deep copy of a model with recomputed layers is not tied to the first one's weights."""
    model = HFModel(zoo.build("llama"), gradient_checkpointing=True)
    other = copy.deepcopy(model)
    tokens = torch.arange(3, 9)[None]
    before = other.hidden_states(tokens, torch.arange(6)[None])
    with torch.no_grad():
        for p in model.model.parameters():
            p.zero_()
    assert torch.equal(other.hidden_states(tokens, torch.arange(6)[None]), before)
