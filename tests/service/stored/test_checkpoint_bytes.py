"""What a checkpoint will take on the disk is counted before it is written, to the byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from servers import MODEL, Direct

from pullback.backends.native.checkpoints.files import tensors_size, write_tensors
from pullback.service.durability.answers import Failure
from pullback.service.limits import Limits
from pullback.service.quotas import Quota
from pullback.service.stored import saving

SLOW = pytest.mark.slow
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.uint8, torch.int64, torch.bool]
shapes = st.lists(st.integers(0, 12), max_size=3).map(tuple)
names = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters='"\\'), min_size=1, max_size=9)


@given(
    named=st.dictionaries(names, shapes, max_size=12), dtypes=st.lists(st.sampled_from(DTYPES), min_size=1, max_size=3)
)
def test_the_size_of_a_file(
    named: dict[str, tuple[int, ...]], dtypes: list[torch.dtype], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """As safetensors writes it: exact with one dtype, and within eight bytes a tensor with several."""
    file = tmp_path_factory.mktemp("sizes") / "a.safetensors"
    tensors = {name: torch.zeros(shape, dtype=dtypes[i % len(dtypes)]) for i, (name, shape) in enumerate(named.items())}
    write_tensors(tensors, file)
    difference = abs(tensors_size(tensors) - file.stat().st_size)
    assert difference == 0 if len({tensor.dtype for tensor in tensors.values()}) < 2 else difference <= 8 * len(tensors)


def nothing(direct: Direct) -> int:
    return 1


def gradient(direct: Direct) -> int:
    direct.read(direct.gradient(1))
    return 2


def step(direct: Direct) -> int:
    direct.read(direct.call("optim_step", gradient(direct)))
    return 3


def both(direct: Direct) -> int:
    direct.read(direct.gradient(step(direct), "grpo"))
    return 4


@pytest.mark.parametrize(
    "before",
    [pytest.param(nothing, marks=SLOW), pytest.param(gradient, marks=SLOW), pytest.param(step, marks=SLOW), both],
)
def test_it_is_what_is_written(
    direct: Direct, before: Callable[[Direct], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, moments, gradients, random state, and what is said of them: of every kind of checkpoint."""
    number, counted = before(direct), list[int]()
    monkeypatch.setattr(direct.operations, "require_space", lambda owner, size: counted.append(size))
    for verb in ("save_weights", "save_for_sampler", "save_external"):
        metadata = {"text": "x" * 1000}
        path = direct.read(direct.call(verb, number, path="one", user_metadata=metadata, ttl_seconds=5000))["path"]
        assert counted.pop() == direct.models.checkpoints.size(path)
        number += 1
    assert isinstance(direct.read(direct.call("save_weights", number, path="one", overwrite=True)), dict)
    assert counted == [0], "what is replaced is larger"


@SLOW
def test_an_export_that_is_encrypted(direct: Direct, monkeypatch: pytest.MonkeyPatch) -> None:
    """At least what is written, and at most 5 kB more for one reader."""
    pyrage = pytest.importorskip("pyrage", reason="exports are encrypted by pyrage (extra serve)")
    counted: list[int] = []
    monkeypatch.setattr(direct.operations, "require_space", lambda owner, size: counted.append(size))
    reader = str(pyrage.x25519.Identity.generate().to_public())
    path = direct.read(direct.call("save_external", 1, path="shut", age_encryption_recipients=[reader]))["path"]
    size = direct.models.checkpoints.size(path)
    assert size <= counted[0] <= size + 5000


@pytest.mark.parametrize("short", [pytest.param(0, marks=SLOW), 1])
def test_the_quota_is_asked_for_the_moments_too(direct: Direct, short: int, tmp_path: Path) -> None:
    """With room for all that is written it is; with a byte less nothing is, though the weights alone would fit."""
    number = step(direct)
    backend = direct.models.backends[MODEL]
    assert backend.checkpoint_bytes() > 2 * backend.checkpoint_bytes(everything=False)
    asked: list[Any] = []
    refusal = Quota.refusal

    def one_byte(self: Quota, own: float, used: float, more: float = 1, **rest: Any) -> str | None:
        if self.what != "bytes of checkpoints":
            return refusal(self, own, used, more, **rest)
        asked.append(more)
        return refusal(Quota(self.what, self.total, int(more) - short), own, used, more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Quota, "refusal", one_byte)
        answer = direct.read(direct.call("save_weights", number, path="one"))
    written = [path for path in direct.models.checkpoints.folder(MODEL, "weights").glob("*/*") if path.is_file()]
    assert len(asked) == 1
    assert isinstance(answer, Failure) == bool(short) == (not written)
    assert not short or f"its quota is {asked[0] - 1:,}" in answer.text


@SLOW
def test_without_a_quota_nothing_is_refused(direct: Direct) -> None:
    """The negative control: what ends a server asks for no space."""
    direct.operations.limits = Limits(disk_per_key=1)
    assert isinstance(direct.read(direct.call("save_weights", 1, path="one")), Failure)
    asked = saving.Save("me", MODEL, "weights", 1, "one")
    assert saving.save(direct.models, direct.journal, asked) == f"tinker://{MODEL}/weights/one"
