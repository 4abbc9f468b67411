"""One rank of a job in which what the model trains is changed after the backend was made, on all ranks or on one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from helpers import tiny_llama
from many_ranks.failing_cases import DATA, NEXT, PARAMS, summed
from many_ranks.outcomes import Outcome, difference, tried, weights
from torch import Tensor, nn

from pullback.backends import TorchBackend
from pullback.testing import TinyLM

__all__ = ["ALONE", "CALLS", "CASES", "FROZEN", "PENALTIES", "STATES", "UNLIKE", "kind_of"]

STATES: Final = ("sharded", "gathered")  # how the weights lie when the model is changed
Change = Callable[[Any], object]


def _half_frozen() -> nn.Module:
    return _without(TinyLM(), "blocks.1.up")


def _without(model: nn.Module, name: str) -> nn.Module:
    model.get_parameter(name).requires_grad_(False)
    return model


def _adapted() -> nn.Module:
    return tiny_llama(lora=2, vocab=17)


def _with_another() -> nn.Module:
    import peft

    model: Any = tiny_llama(lora=2, vocab=17)
    torch.manual_seed(1)  # the same on every rank
    model.model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.model.set_adapter("default")
    return model  # type: ignore[no-any-return]


def _replace(model: nn.Module, requires_grad: bool) -> None:
    model.norm = nn.Parameter(torch.zeros(8, dtype=torch.float64), requires_grad=requires_grad)


def _replace_head(model: nn.Module) -> None:
    model.unembedding = nn.Parameter(torch.zeros(17, 8, dtype=torch.float64), requires_grad=False)


def _replace_one_of_two(model: Any) -> None:
    """The head alone, which was the embedding."""
    model.model.lm_head.weight = nn.Parameter(torch.zeros(17, 16, dtype=torch.float64), requires_grad=False)


def _head_alone(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        p.requires_grad_(name == "unembedding")


# A model, and what is done to it after its backend was made.
CASES: Final[dict[str, tuple[Callable[[], nn.Module], Change]]] = {
    "unfrozen": (_half_frozen, lambda m: m.get_parameter("blocks.1.up").requires_grad_()),
    "replaced": (TinyLM, partial(_replace, requires_grad=True)),
    "replaced by what is frozen": (TinyLM, partial(_replace, requires_grad=False)),
    "a tied one replaced": (partial(tiny_llama, vocab=17), _replace_one_of_two),
    "cut head replaced": (TinyLM, _replace_head),
    "all frozen": (TinyLM, lambda m: m.requires_grad_(False)),
    "head alone": (TinyLM, _head_alone),
    "merged": (_adapted, lambda m: m.model.merge_adapter()),
    "switched off": (_adapted, lambda m: m.model.base_model.disable_adapter_layers()),
    "another adapter": (_with_another, lambda m: m.model.set_adapter("other")),
    "another dtype": (TinyLM, lambda m: m.to(torch.float32)),
}
ALONE: Final = ("unfrozen", "replaced", "replaced by what is frozen", "all frozen", "switched off", "another adapter")
# What all ranks may do alike, and each does otherwise.
UNLIKE: Final[dict[str, tuple[Callable[[], nn.Module], Change]]] = {
    "as many frozen": (TinyLM, lambda m: _without(_without(m, "norm"), f"blocks.{dist.get_rank()}.up")),
    "cut head frozen": (TinyLM, lambda m: m.get_parameter("unembedding").requires_grad_(dist.get_rank() == 0)),
}
FROZEN: Final = {"a layer's": "blocks.1.up", "cut head": "unembedding"}
CALLS: Final[dict[str, Callable[[TorchBackend], Any]]] = {
    "registered": lambda b: b.forward_backward(DATA, "cross_entropy"),
    "custom": lambda b: b.forward_backward_custom(DATA, summed),
    "retained": lambda b: b.backward({b.forward_retain(DATA).result(): range(len(DATA))}, DATA, "cross_entropy"),
}


def kind_of(case: str, state: str, reshard: bool, ranks: str = "all") -> str:
    return f"{case}, {state}, {'resharded' if reshard else 'whole'}, {ranks}"


def made(model: nn.Module, state: str, reshard: bool, cut: bool = False) -> TorchBackend:
    """Return a backend that has accumulated a gradient, and whose weights lie as they are to."""
    backend = TorchBackend(model, reshard=reshard, vocab_parallel=cut, timeout=30)
    backend.forward_backward(DATA, "ppo").result()
    if state == "sharded":
        backend._everywhere._shards.release()  # type: ignore[union-attr]
    return backend


def changed(case: str, state: str, reshard: bool, alone: bool) -> Outcome:
    """Change a model on all ranks, or on rank 1 alone; what each call is told, and how far gradients and weights are moved."""
    make, change = {**CASES, **UNLIKE}[case]
    backend = made(make(), state, reshard, cut="cut" in case)
    before = {name: g.clone() for name, g in backend.gradients().items()}
    if not alone or dist.get_rank() == 1:
        change(backend.model)
    told: Outcome = {name: tried(partial(call, backend)) for name, call in CALLS.items()}
    told["forward"] = tried(lambda: backend.forward(DATA))
    return told | {"moved": 0.0 if case == "another dtype" else difference(backend.gradients(), before)}


def frozen(case: str, state: str, reshard: bool) -> float:
    """A weight that is frozen later stays, over two steps, and the others are trained as on one process."""
    many, one = made(TinyLM(), state, reshard, cut="cut" in case), TorchBackend(TinyLM(), mesh=None)
    one.forward_backward(DATA, "ppo").result()
    for backend in (many, one):
        backend.optim_step(PARAMS).result()
        if state == "gathered":
            backend.forward(DATA).result()
        _without(backend.model, FROZEN[case])
        for data in (NEXT, DATA):
            backend.forward_backward(data, "ppo").result()
            backend.optim_step(PARAMS).result()
    return difference(weights(many), weights(one))


def frozen_and_back(reshard: bool) -> float:
    """What is frozen and unfrozen again is trained again."""
    many, one = made(TinyLM(), "gathered", reshard), TorchBackend(TinyLM(), mesh=None)
    one.forward_backward(DATA, "ppo").result()
    for backend in (many, one):
        _without(backend.model, "norm")
        backend.forward_backward(NEXT, "ppo").result()
        backend.optim_step(PARAMS).result()
        backend.model.get_parameter("norm").requires_grad_()
        backend.forward_backward(DATA, "ppo").result()
        backend.optim_step(PARAMS).result()
    return difference(weights(many), weights(one))


def _norm_of(model: nn.Module) -> Tensor:
    squares = [p.square().sum() for p in model.parameters()]
    return torch.stack([s.full_tensor() if hasattr(s, "full_tensor") else s for s in squares]).sum()


def _forward_of(model: Any) -> Tensor:
    tokens = torch.arange(4)[None]
    return model.hidden_states(tokens, tokens).square().sum()  # type: ignore[no-any-return]


PENALTIES: Final[dict[str, Callable[[nn.Module], Tensor]]] = {"norm": _norm_of, "forward": _forward_of}


def penalised(penalty: str, reshard: bool) -> Outcome:
    """A loss that depends on the weights themselves; without a gradient it does no harm."""
    backend, one = made(TinyLM(), "gathered", reshard), TorchBackend(TinyLM(), mesh=None)
    one.forward_backward(DATA, "ppo").result()

    def loss(data: Sequence[Any], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        return summed(data, logprobs)[0] + PENALTIES[penalty](backend.model), {}

    def constant(data: Sequence[Any], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        with torch.no_grad():
            other = PENALTIES[penalty](backend.model)
        return summed(data, logprobs)[0] + other, {}

    told = tried(lambda: backend.forward_backward_custom(DATA, loss))
    backend.forward_backward_custom(DATA, constant).result()
    one.forward_backward_custom(DATA, summed).result()
    return told | {"apart": difference(backend.gradients(), one.gradients())}


def main(target: str) -> None:
    dist.init_process_group("gloo")
    found: Outcome = {
        kind_of(case, state, reshard, ranks): changed(case, state, reshard, ranks == "one")
        for case in CASES
        for state in STATES
        for reshard in (False, True)
        for ranks in ("all", "one")
        if ranks == "all" or (case in ALONE and state == "gathered")
    }
    for reshard in (False, True):
        found |= {kind_of(case, s, reshard, "one"): changed(case, s, reshard, False) for case in UNLIKE for s in STATES}
        found |= {kind_of(f"{case} frozen", s, reshard): frozen(case, s, reshard) for case in FROZEN for s in STATES}
        found[kind_of("back", "gathered", reshard)] = frozen_and_back(reshard)
        found |= {kind_of(penalty, "gathered", reshard): penalised(penalty, reshard) for penalty in PENALTIES}
    Path(f"{target}-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
