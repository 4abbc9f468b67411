"""The first process of several: what it sends, to whom a call belongs, and that sending it changes no number."""

from __future__ import annotations

import gc
import inspect
import json
import math
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import make_data
from hypothesis import given
from hypothesis import strategies as st
from servers import MODEL, Direct, tiny_models
from torch.distributed.device_mesh import init_device_mesh

from pullback.backends import AdamParams, TorchBackend
from pullback.backends.native.distributed.agreement.message import Message
from pullback.backends.native.models.lora import LoraChoice
from pullback.errors import CheckpointError, LostRankError, NonFiniteError, RankFailedError, RanksDifferError
from pullback.service import ServedModels
from pullback.service.custom_loss.interpreter import LossGraph
from pullback.service.distributed.channel import Command, ForwardHandles
from pullback.service.distributed.lead import LOCAL, TOGETHER, leading
from pullback.service.distributed.member import MODELS, Member
from pullback.service.queueing.requirements import failure_of

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this build of PyTorch has no torch.distributed")
GRAPH = LossGraph(
    "sum", [("logprobs", 1)], [{"op": "output", "name": "out", "args": [["logprobs"]], "target": "output"}]
)
ARGUMENTS = st.one_of(
    st.builds(lambda seed: make_data([4, 3], seed), st.integers(0, 99)),
    st.builds(AdamParams, learning_rate=st.floats(0, 1)),
    st.builds(LoraChoice, rank=st.integers(1, 64), train_unembed=st.booleans()),
    st.builds(ForwardHandles, st.dictionaries(st.integers(1), st.lists(st.integers(0, 9)))),
    st.just(GRAPH),
    st.none() | st.text() | st.integers() | st.dictionaries(st.text(), st.floats(allow_nan=False)),
)


@pytest.fixture
def member(tmp_path: Path) -> Iterator[Member]:
    """A process that leads nobody but itself."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        yield Member(tiny_models(tmp_path), init_device_mesh("cpu", (1,)), 10.0)
    finally:
        dist.destroy_process_group()


def trained(direct: Direct) -> list[Any]:
    """Train, sample, save and load; return all answers."""
    direct.start()
    requests = [direct.gradient(1), direct.call("optim_step", 2), direct.gradient(3, "grpo")]
    requests += [direct.call("save_weights", 4, path="a"), direct.call("optim_step", 5)]
    requests += [direct.call("load_weights", 6, path=f"tinker://{MODEL}/weights/a", optimizer=True)]
    requests += [direct.call("optim_step", 7), direct.call("save_for_sampler", 8, path="b")]
    return [direct.read(request) for request in requests]


def plain(value: Any) -> Any:
    """Return a value as what can be compared: tensors as lists."""
    if isinstance(value, list):
        return [
            (d.model_input.tokens.tolist(), {k: v.to_torch().tolist() for k, v in d.loss_fn_inputs.items()})
            for d in value
        ]
    return value


def test_every_method_of_a_backend_has_its_place() -> None:
    """A method that is new, and that only the first process would call, is noticed."""
    methods = {name for name, value in inspect.getmembers(TorchBackend, callable) if not name.startswith("_")}
    assert methods == TOGETHER | LOCAL
    assert not TOGETHER & LOCAL
    assert all(callable(getattr(ServedModels, name)) for name in MODELS)


@given(st.sampled_from(sorted(TOGETHER)), st.lists(ARGUMENTS, max_size=3), st.lists(st.integers(1), max_size=4))
def test_a_command_arrives_as_it_was_sent(name: str, args: list[Any], dropped: list[int]) -> None:
    """Everything that the service gives to a backend can be sent, and is the same on the other side."""
    sent = Command(name, "m", args, {"overwrite": True}, 7, dropped)
    found = Command.of(sent.to_bytes())
    assert [plain(value) for value in found.args] == [plain(value) for value in args]
    assert (found.name, found.model, found.handle, found.dropped) == (name, "m", 7, dropped)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64]
)
@given(shape=st.lists(st.integers(0, 3), max_size=3), turned=st.booleans())
def test_a_tensor_arrives_as_it_was_sent(dtype: torch.dtype, shape: list[int], turned: bool) -> None:
    """Of whatever dtype and strides, empty ones and those that need a gradient too, and as one that may be written to."""
    values = torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape).to(dtype)
    sent = values.mT if turned and len(shape) > 1 else values
    sent = sent.clone(memory_format=torch.preserve_format).requires_grad_(turned and dtype.is_floating_point)
    (found,) = Command.of(Command("forward", "m", [sent]).to_bytes()).args
    assert (found.dtype, found.shape, found.requires_grad) == (sent.dtype, sent.shape, sent.requires_grad)
    assert torch.equal(found, sent)
    found.detach().zero_()


def test_datums_are_sent_as_little_more_than_their_numbers() -> None:
    """A tensor takes a few dozen bytes beside its numbers: torch's own form, a file for each, takes 400 and much time."""
    data = make_data([7] * 20)
    tensors = [d.model_input.tokens for d in data] + [x.to_torch() for d in data for x in d.loss_fn_inputs.values()]
    numbers = sum(x.numel() * x.element_size() for x in tensors)
    assert len(Command("forward", "m", [data]).to_bytes()) < numbers + 100 * len(tensors)


def test_a_service_that_leads_gives_the_same_answers(member: Member, tmp_path: Path) -> None:
    """Every answer and every number of the checkpoint is that of a service of its own."""
    (tmp_path / "alone").mkdir()
    alone = Direct(tmp_path / "alone")
    expected = trained(alone)
    with leading(member) as models:
        found = Direct(tmp_path, models)
        assert trained(found) == expected
        for name, p in alone.models.backends[MODEL].model.named_parameters():
            assert torch.equal(dict(member.models.backends[MODEL].model.named_parameters())[name], p)
        found.sequencer.close()
    alone.sequencer.close()


def test_retained_forwards_are_named_by_number_and_let_go(member: Member, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward names the forward that it uses; one that nobody holds any more is dropped with the next command."""
    sent: list[Command] = []
    send, data = member.channel.send, make_data([4, 3])

    def watched(raw: bytes) -> None:
        sent.append(Command.of(raw))
        send(raw)

    monkeypatch.setattr(member.channel, "send", watched)
    with leading(member) as models:
        models.create("m", LoraChoice(rank=2))
        backend = models.backend("m")
        kept, unused = (backend.forward_retain(data, budget=1e9).result() for _ in range(2))
        backend.backward({kept: [0, 1]}, data, "cross_entropy").result()
        numbers = [command.handle for command in sent if command.name == "forward_retain"]
        assert sent[-1].args[0] == ForwardHandles({numbers[0]: [0, 1]})
        assert not any(command.dropped for command in sent)
        del unused
        gc.collect()
        backend.optim_step(AdamParams()).result()
        assert sent[-1].dropped == [numbers[1]]


def test_what_cannot_be_sent_is_refused_before_anybody_hears_of_it(member: Member) -> None:
    """A function of this process cannot be sent; the next call is made as if it had not been asked for."""
    with leading(member) as models:
        models.create("m", LoraChoice(rank=2))
        with pytest.raises((AttributeError, pickle.PicklingError), match="pickle"):
            models.backend("m").forward_backward_custom(make_data([4]), lambda data, logprobs: (logprobs[0].sum(), {}))
        assert models.backend("m").forward(make_data([4])).result().metrics


def test_a_model_that_could_not_be_made_is_nowhere(member: Member, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an error behind the making of a model it is let go, and its id may be used again."""
    with leading(member) as models:
        with monkeypatch.context() as patch:
            patch.setattr(Member, "_state", lambda self, model: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                models.create("m", LoraChoice(rank=2))
        assert not models.backends
        models.create("m", LoraChoice(rank=2))
        assert list(models.backends) == ["m"]


@pytest.mark.parametrize(
    ("error", "category"),
    [
        (LostRankError("gone"), "server"),
        (RankFailedError("failed"), "server"),
        (RankFailedError("failed on rank 1: NonFiniteError: not finite", "not finite"), "user"),
        (RanksDifferError("other"), "server"),
        (ValueError("rank must be positive"), "user"),
    ],
)
def test_whose_fault_it_is(error: Exception, category: str) -> None:
    """What one process meets alone is not the client's mistake."""
    assert failure_of(error).category == category


@pytest.mark.parametrize(
    ("error", "refusal"),
    [
        (NonFiniteError("datum 1: not finite"), "datum 1: not finite"),
        (ValueError("no such reward"), "no such reward"),
        (CheckpointError("no such checkpoint"), None),  # which the others have found
        (torch.OutOfMemoryError("out of memory"), None),
        (RanksDifferError("another batch"), None),
    ],
)
def test_what_a_process_refuses_is_told_from_what_it_meets_alone(error: Exception, refusal: str | None) -> None:
    """The others read both, and only what lies in the data or in the loss as a refusal."""
    said = Message.of(Message.of_failure(error, "here").to_tensor())
    assert said.failed
    assert said.refusal == refusal
    assert said.error == f"{type(error).__name__}: {error}"


def test_the_answer_of_a_lost_process_names_no_path(member: Member, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client reads what to do; the transport's own words, with files and addresses, are logged."""

    def gone(raw: bytes) -> None:
        raise RuntimeError("[/pytorch/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.7]:3503")

    with leading(member) as models:
        models.create("m", LoraChoice(rank=2))
        assert models.failure is None
        with monkeypatch.context() as patch:
            patch.setattr(member.channel, "send", gone)
            with pytest.raises(LostRankError, match=r"^forward: this server has lost one of its processes") as caught:
                models.backend("m").forward(make_data([4]))
        assert "/" not in json.dumps(str(caught.value))
        with pytest.raises(LostRankError, match="this server has lost one of its processes"):
            models.backend("m").forward(make_data([4]))
        assert re.fullmatch("this server has lost one of its processes.*must be started again", str(models.failure))
        models.release("m")
        assert not models.backends
