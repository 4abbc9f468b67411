"""One process of ``pullback serve`` under torchrun; the second one may be told to fail, by what it is asked for."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any, Final

import torch

from pullback.backends import TorchBackend
from pullback.backends.native.distributed.passes import Passes
from pullback.backends.operations.futures import FinishedFuture
from pullback.cli import main
from pullback.errors import NonFiniteError
from pullback.service import Base, ServedModels

# What a client asks for to let the second process fail.
NO_MEMORY_RANK: Final = 5  # of an adapter: it cannot be made
SKIPPED_RANK: Final = 7  # of an adapter: it is not made, without an error
SKIPPED_RATE: Final = 0.125  # a step with this learning rate is not made
KILLED_TOKENS: Final = [1, 1, 1, 1]  # a gradient whose first datum is this kills the process half-way
REFUSED_TOKENS: Final = [2, 2, 2, 2]  # one whose first datum is this is refused for what lies in the process's share


def plant() -> None:
    """Let this process fail where it is asked for one of these."""
    adapted, create = Base.adapted, ServedModels.create
    step, stream = TorchBackend.optim_step, Passes.stream

    def adapted_or_not(self: Base, lora: Any) -> Any:
        if getattr(lora, "rank", 0) == NO_MEMORY_RANK:
            raise torch.OutOfMemoryError("planted")
        return adapted(self, lora)

    def create_or_not(self: ServedModels, model_id: str, lora: Any, explicit: Any = ()) -> None:
        if lora.rank != SKIPPED_RANK:
            create(self, model_id, lora, explicit)

    def step_or_not(self: TorchBackend, params: Any, *rest: Any) -> Any:
        return FinishedFuture() if params.learning_rate == SKIPPED_RATE else step(self, params, *rest)

    def stream_or_die(self: Passes, call: Any) -> Any:
        if call.data[0].model_input.tokens.tolist() == KILLED_TOKENS:
            os.kill(os.getpid(), signal.SIGKILL)
        if call.data[0].model_input.tokens.tolist() == REFUSED_TOKENS:
            raise NonFiniteError("the gradient of datum 1 is not finite")
        return stream(self, call)

    made: Any = (Base, "adapted", adapted_or_not), (ServedModels, "create", create_or_not)
    for owner, name, planted in (*made, (TorchBackend, "optim_step", step_or_not), (Passes, "stream", stream_or_die)):
        setattr(owner, name, planted)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if os.environ["RANK"] == "1":
        plant()
    raise SystemExit(main(sys.argv[1:]))
