"""Lightning and Fabric: a batch is a whole optimizer step, a list of micro-batches, so that its tokens are known before it.

Under ``Trainer(accumulate_grad_batches=n)`` Lightning would hand over one micro-batch at a time and divide its loss by n; it
passes no count of the step. Data parallelism averages over the processes, which ``averaged_over`` undoes.
"""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader
from toy_rows import micro_batches, rows, toy_model

from pullback.losses import CountedLoss, CrossEntropy, TokenBatch
from pullback.ops import logprobs_of

LOSS = CrossEntropy("token_mean")
MicroBatches = list[dict[str, Any]]


def share_of_step(batches: MicroBatches, runner: Any) -> CountedLoss:
    """Return the loss divided by the tokens of all micro-batches on all processes, for a Trainer or a Fabric."""
    own = torch.tensor(sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches))
    reduce = getattr(runner, "all_reduce", None) or runner.strategy.reduce
    return LOSS.with_counts(tokens=reduce(own, reduce_op="sum"), averaged_over=runner.world_size)


class Module(lightning.LightningModule):  # type: ignore[misc]  # lightning is not typed here
    def __init__(self, model: Any, optimizer: Any = torch.optim.AdamW) -> None:
        super().__init__()
        self.model, self.optimizer, self.automatic_optimization = model, optimizer, False

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.model.parameters(), lr=1e-2)

    def training_step(self, batches: MicroBatches, index: int) -> None:
        share = share_of_step(batches, self.trainer)
        for batch in batches:
            logprobs = logprobs_of(self.model, **batch)
            self.manual_backward(share.evaluate(TokenBatch.from_labels(logprobs, batch["labels"])))
        self.optimizers().step()
        self.optimizers().zero_grad()


def fabric_step(fabric: Any, model: Any, optimizer: Any, batches: MicroBatches) -> None:
    """The same in a loop of one's own, with Fabric."""
    share = share_of_step(batches, fabric)
    for i, batch in enumerate(batches):
        with fabric.no_backward_sync(model, enabled=i + 1 < len(batches)):
            fabric.backward(share.evaluate(TokenBatch.from_labels(logprobs_of(model, **batch), batch["labels"])))
    optimizer.step()
    optimizer.zero_grad()


if __name__ == "__main__":
    data: DataLoader[Any] = DataLoader([micro_batches(rows())], batch_size=None)  # type: ignore[arg-type]  # a list
    lightning.Trainer(accelerator="cpu", max_epochs=4, logger=False).fit(Module(toy_model()), data)
