"""One rank of a job that trains with a head in parts, and writes how far that ends from one process with a whole head."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from unittest import mock

import torch
import torch.distributed as dist
from many_ranks.many_cases import LOSSES, PARAMS, apart, steps
from many_ranks.payload import Payload
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from pullback.backends import TorchBackend
from pullback.backends.native import HFModel
from pullback.backends.native.distributed.vocabulary.rows import HeadRows
from pullback.backends.native.dtensors import local_part
from pullback.backends.native.models.lora import add_lora
from pullback.backends.types import SamplingParams
from pullback.datums import Datum, ModelInput
from pullback.ops import Head
from pullback.testing import TinyLM, example_datums, random_llama

__all__ = ["CASES", "FEW", "name_of"]

VOCAB: Final = 25  # neither 2 nor 4 divides it
LENGTHS: Final = (5, 7, 3, 9, 2, 8)
DATA: Final = example_datums(list(LENGTHS), seed=5, vocab_size=VOCAB)
ODD: Final[dict[str, list[list[Datum]]]] = {
    "two calls": [example_datums([6, 4], vocab_size=VOCAB), DATA],
    "one unit": [example_datums([5, 4], seed=6, vocab_size=VOCAB)],  # the other ranks have nothing
    "temperatures": [
        [
            *example_datums([6, 4], vocab_size=VOCAB, temperature=0.7),
            *example_datums([5, 3, 7], seed=2, vocab_size=VOCAB),
        ]
    ],
}


class Shaped(nn.Module):
    """A model whose head has a bias, a scale and a soft cap."""

    def __init__(self, vocab: int = VOCAB, frozen: bool = False) -> None:
        super().__init__()
        self.trunk = TinyLM(vocab_size=vocab)
        self.weight = nn.Parameter(self.trunk.unembedding.detach().clone())
        self.bias = nn.Parameter(torch.linspace(-1, 1, vocab, dtype=torch.float64))
        del self.trunk.unembedding
        self.requires_grad_(True)
        self.weight.requires_grad_(not frozen)
        self.bias.requires_grad_(not frozen)

    def hidden_states(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.trunk.hidden_states(tokens, positions)

    def head(self) -> Head:
        return Head(self.weight, self.bias, 5.0, 0.5)


def llama(lora: bool) -> HFModel:
    shape = {"vocab_size": VOCAB, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = random_llama(**shape, max_position_embeddings=128, tie_word_embeddings=False, dtype=torch.float64)
        return HFModel(add_lora(model, 4) if lora else model)


MODELS: Final[dict[str, Callable[[], nn.Module]]] = {
    "full": lambda: llama(False),
    "lora": lambda: llama(True),
    "shaped": Shaped,
    "frozen": lambda: Shaped(frozen=True),
}


def several(data: Sequence[Datum], logprobs: list[Tensor]) -> tuple[Tensor, Mapping[str, float]]:
    """Distil: K targets of every position, each with a weight of its own."""
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    return -torch.stack([(weights * x).sum() for x in logprobs]).exp().sum() - sum(
        (weights * x).sum() for x in logprobs
    ), {}


def with_targets(count: int) -> list[Datum]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for datum in DATA[:count]:
        length = len(datum.model_input.to_ints())
        targets = torch.randint(VOCAB, (length, 3), generator=generator)
        found.append(Datum(datum.model_input, {"target_tokens": targets}))
    return found


FEW: Final = [
    ("full", "grpo", "two calls", False),
    ("lora", "coupled", "two calls", True),
    ("frozen", "ppo", "temperatures", False),
    ("shaped", "several", "K targets", True),
]
CASES: Final = [
    *FEW,
    ("full", "coupled", "one unit", True),
    ("full", "grpo", "two calls", True),
    ("lora", "dpo", "one unit", False),
    ("lora", "orpo", "two calls", False),
    ("shaped", "cross_entropy", "temperatures", True),
    ("shaped", "grpo", "one unit", False),
    ("shaped", "ordered", "two calls", True),
    ("frozen", "several", "K targets", False),
    ("frozen", "gspo", "two calls", True),
]


def name_of(model: str, loss: str, kind: str, reshard: bool) -> str:
    return f"{model}-{loss}-{kind}-{'resharded' if reshard else 'whole'}"


def pair(model: str, **options: Any) -> tuple[TorchBackend, TorchBackend]:
    """Return a backend on all ranks whose head is in parts, and one on this process alone."""
    given: dict[str, Any] = {"timeout": 60, "token_budget": 16, "vocab_parallel": True, **options}
    return TorchBackend(MODELS[model](), **given), TorchBackend(MODELS[model](), mesh=None, token_budget=16)


def tried(model: str, loss: str, kind: str, reshard: bool, **options: Any) -> dict[str, float]:
    many, one = pair(model, reshard=reshard, **options)
    calls = [with_targets(3)] if loss == "several" else ODD[kind]
    given = several if loss == "several" else LOSSES[loss]
    return apart(steps(many, given, calls), steps(one, given, calls))


def few_rows() -> dict[str, float]:
    """A vocabulary so small that the last of four ranks has no row of it."""
    many = TorchBackend(Shaped(9), vocab_parallel=True, reshard=False, timeout=60, token_budget=16)
    one = TorchBackend(Shaped(9), mesh=None, token_budget=16)
    data = [example_datums(list(LENGTHS), vocab_size=9)]
    return apart(steps(many, "grpo", data), steps(one, "grpo", data))


def replicas() -> dict[str, Any]:
    """Two replicas of two shards; and what happens where the rows' gradients are not added up over replicas."""

    def mesh() -> Any:
        return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))

    found: dict[str, Any] = {
        f"replicas, {model}": tried(model, "grpo", "two calls", reshard, mesh=mesh())
        for model, reshard in (("full", False), ("shaped", True))
    }
    with mock.patch.object(HeadRows, "reduce"):
        found["replicas, not reduced"] = tried("shaped", "grpo", "two calls", False, mesh=mesh())
    return found


def cotangents_of_this_rank() -> dict[str, float]:
    """The control: each rank goes back with the cotangents of its own positions alone."""
    from pullback.ops import own_positions

    gather = own_positions._gather

    def own(tensor: Tensor, counts: Sequence[int], group: Any) -> list[Tensor]:
        found = gather(tensor, counts, group)
        if tensor.dim() > 1 or not tensor.is_floating_point():
            return found
        return [x if r == dist.get_rank(group) else torch.zeros_like(x) for r, x in enumerate(found)]

    with mock.patch.object(own_positions, "_gather", own):
        return tried("shaped", "grpo", "two calls", False)


def moved(folder: Path) -> dict[str, float]:
    """Saved in parts and loaded whole on one process, and the reverse: what comes next is the same."""
    many, one = pair("shaped", reshard=False, checkpoint_dir=folder)
    for backend in (many, one):
        steps(backend, "ppo", [DATA])
    path = many.save_state("of-many", overwrite=True).result().path
    alone = TorchBackend(MODELS["shaped"](), mesh=None, token_budget=16, checkpoint_dir=folder / str(dist.get_rank()))
    alone.load_state_with_optimizer(path).result()
    back = alone.save_state("of-one", overwrite=True).result().path
    if dist.get_rank() == 0:
        (folder / "of-one").symlink_to(back, target_is_directory=True)
    dist.barrier()
    again = pair("shaped", reshard=True)[0]
    again.load_state_with_optimizer(folder / "of-one").result()
    expected = steps(one, "ppo", [DATA])
    return {
        "in parts, then whole": max(apart(steps(alone, "ppo", [DATA]), expected).values()),
        "whole, then in parts": max(apart(steps(again, "ppo", [DATA]), expected).values()),
    }


def bytes_moved(model: str, loss: str, reshard: bool) -> dict[str, Any]:
    """What the head receives in a call: counted, planned, and of how many positions."""
    many, _ = pair(model, reshard=reshard)
    rows: Any = many._everywhere._shards.rows  # type: ignore[union-attr]
    data = DATA if loss == "coupled" else ODD["temperatures"][0]
    given: Any = LOSSES[loss]
    plan = many.plan(given, data)
    with Payload(head=rows._mesh.get_group(0)) as payload:
        act = many.forward_backward_custom if callable(given) else many.forward_backward
        act(data, given).result()
    many._everywhere._shards.release()  # type: ignore[union-attr]
    return {
        "counted": payload.scored,
        "planned": plan.bytes_moved["head"],
        "rows": len(rows.head().weight),
        "weights": plan.rank_bytes["weights"],
        "held": sum(local_part(p).untyped_storage().nbytes() for p in many.model.parameters()),
    }


def whole_again() -> dict[str, Any]:
    """Sampling, which needs all logits; the reference of full tuning; what is refused."""
    many, one = pair("full", reference=MODELS["full"]())
    prompts = [ModelInput.from_ints([1, 2, 3]), ModelInput.from_ints([4])]
    drawn = [b.sample(prompts, 3, SamplingParams(max_tokens=8)).result() for b in (many, one)]
    steps(many, "grpo", [DATA])
    with_reference = many.reference().forward(DATA).result()
    scored = one.forward(DATA).result()  # which has not been trained
    pairs = zip(with_reference.loss_fn_outputs, scored.loss_fn_outputs, strict=True)
    return {
        "sampled alike": [r.tokens for r in drawn[0]] == [r.tokens for r in drawn[1]],
        "reference": max(float((a["logprobs"].to_torch() - b["logprobs"].to_torch()).abs().max()) for a, b in pairs),
        "gather_weights": _error(lambda: many.gather_weights().result()),
        "tied": _error(lambda: TorchBackend(TinyLM(tied=True), vocab_parallel=True, timeout=60)),
        "auto, tied": _error(lambda: TorchBackend(TinyLM(tied=True), timeout=60)),
        "not the same": _error(lambda: TorchBackend(TinyLM(), vocab_parallel=dist.get_rank() == 0, timeout=60)),
    }


def failing(reshard: bool) -> dict[str, Any]:
    """A loss that fails on rank 1: both have the error, nothing moves, and the next step is that of one process."""
    many, one = pair("shaped", reshard=reshard)
    for backend in (many, one):
        backend.forward_backward(DATA, "ppo").result()
    before = {name: g.clone() for name, g in many.gradients().items()}

    def loss(data: Sequence[Datum], logprobs: list[Tensor]) -> Any:
        if dist.get_rank() == 1:
            raise ValueError("no such reward")
        return several(data, [x[:, None] for x in logprobs])

    error = _error(lambda: many.forward_backward_custom(DATA, loss).result())
    left = max(apart(many.gradients(), before).values())
    ends = []
    for backend in (many, one):
        backend.forward_backward(DATA[:2], "ppo").result()
        ends.append(float(backend.optim_step(PARAMS).result().metrics["grad_norm"]))
    return {"error": error, "moved": left, "next": abs(ends[0] / ends[1] - 1)}


def _error(work: Callable[[], Any]) -> str:
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


BYTES: Final = [("shaped", "cross_entropy", True), ("full", "coupled", False), ("frozen", "coupled", True)]


def main(target: str, what: str) -> None:
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    torch.set_num_threads(1)
    folder = Path(target)
    whole = what == "whole"
    found: dict[str, Any] = {name_of(*case): tried(*case) for case in (CASES if whole else FEW)}
    found |= {"control": cotangents_of_this_rank(), "whole again": whole_again()}
    found |= {f"failing, {reshard}": failing(reshard) for reshard in ((False, True) if whole else (False,))}
    found |= {f"bytes, {case[0]}": bytes_moved(*case) for case in (BYTES if whole else BYTES[:1])}
    found |= {"moved": moved(folder)} if whole else {}
    if dist.get_world_size() == 4:
        found |= {"few rows": few_rows(), **replicas()}
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:3])
