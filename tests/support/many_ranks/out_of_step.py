"""One rank of a job in which rank 1 alone does something that the others could wait for, or be wrong by."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Final, final
from unittest import mock

import torch
import torch.distributed as dist
from helpers import tiny_llama
from many_ranks.failing_cases import BAD, DATA, NEXT, PARAMS, Planted, make, only_on, summed
from many_ranks.outcomes import Outcome, difference, tried, weights
from torch import Tensor

from pullback.backends import TorchBackend
from pullback.backends.native.distributed import schedule
from pullback.backends.native.distributed.checkpoints import load
from pullback.losses import CrossEntropy, TokenBatch
from pullback.losses.evaluation.terms import Summand

__all__ = ["DEALS", "FILES"]

DEALS: Final[dict[str, Callable[[TorchBackend], Any]]] = {
    "forward": lambda b: b.forward(DATA),
    "streamed": lambda b: b.forward_backward(DATA, "ppo"),
    "function": lambda b: b.forward_backward_custom(DATA, summed),
    "retained": lambda b: b.forward_retain(DATA),
}
FILES: Final = {
    "temporary folder": (tempfile, "TemporaryDirectory"),
    "applying": (load, "_apply"),
}


@final
@dataclass(frozen=True)
class OfThisRank(Planted):
    """Its terms are times a number that nobody sees."""

    name: ClassVar[str] = "of_this_rank"

    def terms(self, batch: TokenBatch) -> tuple[Summand, ...]:
        factor = 1.0 + dist.get_rank()
        return tuple(replace(term, scale=factor * term.scale) for term in CrossEntropy().terms(batch))  # type: ignore[type-var]


def planted(target: Any, name: str) -> Any:
    return mock.patch.object(target, name, side_effect=OSError("planted"))


def goes_on(many: TorchBackend, one: TorchBackend) -> float:
    """Weights after what comes next, against one process."""
    for backend in (many, one):
        backend.forward_backward(NEXT, "ppo").result()
        backend.optim_step(PARAMS).result()
    return difference(weights(many), weights(one))


def dealt(name: str, folder: Path, reshard: bool) -> Outcome:
    """Rank 1 cannot lay out its share of a call."""
    many, one = make(folder, reshard=reshard), make(folder, mesh=None)
    for backend in (many, one):
        backend.forward_backward(DATA, "ppo").result()
    with only_on(1, partial(planted, schedule, "share_out")):
        told = tried(lambda: DEALS[name](many))
    return told | {"next": goes_on(many, one)}


def loaded(name: str, folder: Path) -> Outcome:
    """Rank 1 cannot load; then all load again."""
    many, one = make(folder), make(folder / f"alone-{dist.get_rank()}", mesh=None)
    for backend in (many, one):
        backend.forward_backward(DATA, "ppo").result()
        backend.optim_step(PARAMS).result()
    path = many.save_state("loaded", overwrite=True).result().path
    with only_on(1, partial(planted, *FILES[name])):
        told = tried(lambda: many.load_state_with_optimizer(path))
    told["again"] = tried(lambda: many.forward(DATA))
    many.load_state_with_optimizer(path).result()
    return told | {"next": goes_on(many, one)}


def caught(reshard: bool) -> float:
    """A loss of a retained forward that asks for another one, and goes on without it where that fails."""
    many, one = make(Path(), reshard=reshard), make(Path(), mesh=None)
    for backend in (many, one):

        def loss(data: Sequence[Any], logprobs: list[Tensor], backend: Any = backend) -> tuple[Tensor, Any]:
            with planted(schedule, "share_out"):
                assert backend is one or backend.forward(DATA).exception() is not None
            assert backend.forward(BAD).exception() is not None
            return summed(data, logprobs)

        backend.backward({backend.forward_retain(DATA).result(): range(len(DATA))}, DATA, loss).result()
    return difference(many.gradients(), one.gradients())


def half_frozen(reshard: bool) -> list[float]:
    """A bfloat16 model of which a layer is frozen and not sharded: its gradient and log-probs, against one process."""
    found = []
    for options in ({"shard_frozen": False, "reshard": reshard, "timeout": 30}, {"mesh": None}):
        model = tiny_llama(torch.bfloat16)
        for name, p in model.named_parameters():
            p.requires_grad_("layers.0" not in name)
        backend = TorchBackend(model, **options)
        output = backend.forward_backward(DATA, "cross_entropy").result()
        held = {p.dtype for p in model.parameters() if not p.requires_grad}
        assert held == {torch.bfloat16}
        found.append((backend.gradients(), torch.cat([o["logprobs"].to_torch() for o in output.loss_fn_outputs])))
    (ours, scored), (expected, logprobs) = found
    apart = max(float((ours[n].float() - g.float()).norm() / g.float().norm()) for n, g in expected.items())
    return [apart, float((scored - logprobs).abs().max())]


def main(target: str) -> None:
    dist.init_process_group("gloo")
    folder = Path(target).parent / "checkpoints"
    both = (False, True)
    found: Outcome = {
        "dealt": {f"{name}, {reshard}": dealt(name, folder, reshard) for name in DEALS for reshard in both},
        "loaded": {name: loaded(name, folder) for name in FILES},
        "caught": [caught(reshard) for reshard in both],
        "frozen": [half_frozen(reshard) for reshard in both],
        "loss": [tried(lambda r=r: make(folder, reshard=r).forward_backward(DATA, OfThisRank())) for r in both],  # type: ignore[misc]
    }
    Path(f"{target}-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
