"""AdamParams by the names that others have for its fields."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pullback.backends import AdamParams

FIELDS = [field.name for field in dataclasses.fields(AdamParams)]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lr", "AdamParams has no 'lr': write learning_rate=...; it has: learning_rate, beta1,"),
        ("betas", "write beta1=..., beta2=..."),
        ("max_grad_norm", "write grad_clip_norm=..."),
        ("learning_rat", r"no 'learning_rat' \(did you mean 'learning_rate'\?\)"),
        ("amsgrad", "AdamParams has no 'amsgrad'; it has: "),
    ],
)
def test_names_of_others(name: str, words: str) -> None:
    wrong: dict[str, Any] = {name: 0.5}
    with pytest.raises(TypeError, match=words):
        AdamParams(**wrong)


def test_every_setting_of_torch_that_a_step_has_is_known_by_its_name() -> None:
    """AdamW's own arguments are fields here, or the error says which field they are."""
    for name in ("lr", "betas", "eps", "weight_decay"):
        assert name in torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]).defaults
        if name not in FIELDS:
            with pytest.raises(TypeError, match=rf"no '{name}': write (learning_rate|beta1)="):
                AdamParams(**{name: 0.5})


@given(st.lists(st.sampled_from(FIELDS), unique=True))
def test_fields_are_taken_by_name_and_by_place(names: list[str]) -> None:
    """And copies, pickles and replacements are equal."""
    params = AdamParams(**dict.fromkeys(names, 0.5))
    assert AdamParams(*dataclasses.astuple(params)) == params
    assert pickle.loads(pickle.dumps(params)) == copy.deepcopy(params) == dataclasses.replace(params) == params
