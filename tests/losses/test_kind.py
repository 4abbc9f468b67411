"""The gradient kind that a loss declares is measured before anything relies on it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from pullback import TorchBackend
from pullback.errors import ConfigError
from pullback.losses import (
    DPO,
    GRPO,
    ORPO,
    PPO,
    Aggregation,
    CrossEntropy,
    ImportanceSampling,
    Loss,
    Registry,
    Summand,
    Term,
    TokenBatch,
    loss_names,
    registry,
)
from pullback.losses.kind import measured_kind, trusted_kind, wider
from pullback.testing import TinyLM, example_datums

KINDS = ("constant", "token", "sequence", "pair", "batch")


def made(declared: str, values: Callable[[TokenBatch], Tensor]) -> type[Loss]:
    """A loss class with these values per token, which declares a kind."""

    @dataclass(frozen=True)
    class Made(Loss):
        aggregation: Aggregation | str = "token_mean"

        name: ClassVar[str] = "made"
        gradient_kind = declared  # type: ignore[assignment]
        sources: ClassVar[tuple[str, ...]] = ()
        required_inputs: ClassVar[tuple[str, ...]] = ("weights",)

        def terms(self, batch: TokenBatch) -> tuple[Summand, ...]:
            return (Term("made", values(batch), "token", self.main_aggregation),)

    return Made


def squared(batch: TokenBatch) -> Tensor:
    return batch.policy.square()


def times_its_sequence(batch: TokenBatch) -> Tensor:
    means = batch.weighted_row_sum() / batch.weight_per_sequence
    return batch.policy * batch.layout.spread(means, batch.logprobs.dim())


def times_its_pair(batch: TokenBatch) -> Tensor:
    pair = batch.weighted_row_sum().view(-1, 2).sum(1).repeat_interleave(2)
    return batch.policy * batch.layout.spread(pair, batch.logprobs.dim())


def times_everything(batch: TokenBatch) -> Tensor:
    return batch.policy * batch.policy.mean()


VALUES: dict[str, Callable[[TokenBatch], Tensor]] = {
    "constant": lambda batch: -batch.policy,
    "token": squared,
    "sequence": times_its_sequence,
    "pair": times_its_pair,
    "batch": times_everything,
}


@pytest.mark.parametrize("kind", KINDS)
def test_measured(kind: str) -> None:
    """Each kind is told from the others, whatever is declared."""
    assert measured_kind(made("constant", VALUES[kind])()) == kind


@pytest.mark.parametrize(
    "loss",
    [
        *(registry.build(name) for name in loss_names()),
        CrossEntropy("group_mean_token_mean"),
        GRPO(kl=0.1, aggregation="sequence_mean_token_mean"),
        GRPO(clip=None, anchor="none"),
        ORPO(nll="token_mean"),
    ],
    ids=repr,
)
def test_our_own_declare_what_is_measured(loss: Loss) -> None:
    """The package's losses, which are not measured at run time, declare no less than what they depend on."""
    assert wider(loss.gradient_kind, measured_kind(loss))
    assert trusted_kind(loss) == loss.gradient_kind


def test_exactly_declared() -> None:
    """In their common configurations the kinds are the narrowest ones too."""
    for loss in (CrossEntropy(), ImportanceSampling(), PPO(), GRPO(kl=0.1), DPO(), ORPO()):
        assert measured_kind(loss) == loss.gradient_kind


@pytest.mark.parametrize("declared", KINDS)
@pytest.mark.parametrize("true", KINDS)
def test_registration_and_first_use(declared: str, true: str) -> None:
    """A class that declares too little is not registered, and runs as `batch`; one that declares more is fine."""
    made_class = made(declared, VALUES[true])
    if KINDS.index(declared) >= KINDS.index(true):
        assert Registry().register(made_class) is made_class
        assert trusted_kind(made_class()) == declared
        return
    with pytest.raises(ConfigError, match=f"declare gradient_kind = '{true}'"):
        Registry().register(made_class)
    with pytest.warns(UserWarning, match=f"declares gradient kind '{declared}'.*runs as 'batch'"):
        assert trusted_kind(made_class()) == "batch"


def test_what_cannot_be_measured_runs_as_batch() -> None:
    """A loss that refuses the numbers of the measurement is registered, but no fast path relies on it."""

    def refuses(batch: TokenBatch) -> Tensor:
        raise ConfigError("only on Sundays")

    made_class = made("token", refuses)
    Registry().register(made_class)
    with pytest.warns(UserWarning, match="could not be measured \\(only on Sundays\\): it runs as 'batch'"):
        assert trusted_kind(made_class()) == "batch"


@pytest.mark.parametrize("trained", [True, False])
def test_a_wrong_kind_trains_rightly(trained: bool) -> None:
    """A loss that calls itself constant and is not has the gradient of the same maths as a function."""
    loss: Any = made("constant", squared)()

    def gradients(call: Callable[[TorchBackend], Any]) -> dict[str, Tensor]:
        model = TinyLM()
        model.unembedding.requires_grad_(trained)
        backend = TorchBackend(model)
        call(backend)
        return dict(backend.gradients())

    data = example_datums((5, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        named = gradients(lambda b: b.forward_backward(data, loss).result())
    function = gradients(lambda b: b.forward_backward_custom(data, lambda d, x: loss(d, x)).result())
    for name, gradient in function.items():
        # A registered mean is divided at the step, a function's at once.
        scale = sum(float(d.loss_fn_inputs["weights"].to_torch().sum()) for d in data)
        assert gradient.norm() > 0
        assert torch.allclose(named[name], gradient * scale, rtol=1e-9) or torch.allclose(
            named[name], gradient, rtol=1e-9
        )
