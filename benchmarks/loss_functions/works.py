"""What the benchmark of the losses times: each loss in every form, and the targets it is held to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from pullback.losses import DPO, GRPO, KL, ORPO, PPO, CrossEntropy, Loss, TokenBatch

from . import hand_written
from .hand_written import Inputs

__all__ = ["HAND", "HAND_COMPILED", "ROWS", "Result", "Row", "Work", "work", "works"]

HAND, HAND_COMPILED = "hand-written", "hand, compiled"

Result = tuple[Tensor, Tensor]  # the loss and the gradient
Work = Callable[[], Result]


@dataclass(frozen=True, eq=False)
class Row:
    """One loss, and what it is compared with.

    Attributes:
        hand: the hand-written loss that is timed.
        build: makes our loss; a compiled function calls it in its graph.
        reads: per-token and per-sequence inputs beside log-probs and weights.
        exact: the hand-written loss of the same value and gradient, where ``hand`` differs.
        targets: largest ratio, by size and column; ratios to ``hand``, but of ``packed`` to the padded float mask.
    """

    hand: Callable[[Tensor, Inputs], Tensor]
    build: Callable[[], Loss]
    reads: tuple[str, ...] = ()
    exact: Callable[[Tensor, Inputs], Tensor] | None = None
    targets: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def _targets(
    padded: float,
    metrics: float,
    packed: float | None = None,
    compiled: float | None = None,
    small: float | None = None,
) -> dict[str, dict[str, float]]:
    """Targets at 256 x 1024, and at 16 x 256, where a loss without a ratio there may take some microseconds more."""
    large = {"float mask": padded, "bool mask": padded, "packed": packed, "metrics read": metrics, "compiled": compiled}
    known = {column: limit for column, limit in large.items() if limit is not None}
    return {"256x1024": known, "16x256": {} if small is None else {"float mask": small, "bool mask": small}}


POLICY = ("advantages", "rollout_logprobs")
ROWS: Mapping[str, Row] = {
    "cross-entropy, token mean": Row(
        hand_written.cross_entropy_mean, partial(CrossEntropy, "token_mean"), targets=_targets(2.0, 2.2, 1.3)
    ),
    "cross-entropy, sum": Row(
        hand_written.cross_entropy_sum, partial(CrossEntropy, "sum"), targets=_targets(1.2, 2.2, 1.3)
    ),
    "PPO": Row(hand_written.ppo, PPO, POLICY, targets=_targets(0.6, 1.1, 1.3, 0.4, 1.0)),
    "GRPO + KL, pathwise": Row(
        hand_written.grpo,
        lambda: GRPO(kl=KL("k3", hand_written.BETA_KL, "pathwise", importance=False)),
        (*POLICY, "ref_logprobs"),
        targets=_targets(0.7, 1.3, 1.3, 0.4, 1.3),
    ),
    "GRPO + KL, default gradient": Row(
        hand_written.grpo,
        lambda: GRPO(kl=KL("k3", hand_written.BETA_KL)),
        (*POLICY, "ref_logprobs"),
        exact=hand_written.grpo_reverse,
    ),
    "DPO": Row(
        hand_written.dpo,
        partial(DPO, hand_written.BETA_DPO),
        ("ref_logprobs",),
        targets=_targets(1.6, 2.2, compiled=1.0),
    ),
    "ORPO": Row(hand_written.orpo, partial(ORPO, hand_written.LAMBDA_ORPO), targets=_targets(1.6, 2.2)),
}


def work(objective: Callable[[Tensor], Tensor], logprobs: Tensor) -> Work:
    """Return the work that is timed: a new leaf, forward, backward."""

    def forward_backward() -> Result:
        leaf = logprobs.clone().requires_grad_()
        loss = objective(leaf)
        torch.autograd.backward(loss)
        assert leaf.grad is not None
        return loss.detach(), leaf.grad

    return forward_backward


def metrics_read(loss: Loss, given: Inputs, inputs: Mapping[str, Tensor]) -> Work:
    """Return the padded work that reads all metrics after the backward."""

    def forward_backward() -> Result:
        leaf = given.logprobs.clone().requires_grad_()
        output = loss.evaluate(TokenBatch.from_padded(leaf, given.mask, **inputs))
        torch.autograd.backward(output.loss)
        assert dict(output.metrics)
        assert leaf.grad is not None
        return output.loss.detach(), leaf.grad

    return forward_backward


def packed(row: Row, given: Inputs) -> Work:
    """Return the packed work on the same positions: each sequence ends with its last trained token.

    So nothing but the layout differs, and the lengths differ as those of packed sequences do. A sequence begins with
    the padding of the one before it, which is untrained.
    """
    sequences, width = given.mask.shape
    last = (given.mask * torch.arange(1, width + 1)).amax(1).long()
    ends = torch.arange(sequences) * width + last
    ends[-1] = sequences * width
    lengths = ends.diff(prepend=torch.zeros(1, dtype=torch.int64))
    inputs = {name: getattr(given, name) for name in row.reads}
    if "advantages" in inputs:
        inputs["advantages"] = inputs["advantages"][:, None].expand(-1, width)
    flat = {name: value.reshape(-1).contiguous() for name, value in inputs.items()}
    weights, loss = given.mask.reshape(-1), row.build()
    return work(
        lambda x: loss.evaluate(TokenBatch.from_packed(x, lengths, weights=weights, **flat)).loss,
        given.logprobs.reshape(-1),
    )


def compiled(row: Row, given: Inputs) -> Work:
    """Return the padded work in one compiled graph, which builds the loss and the batch.

    Raises:
        Exception: whatever keeps it from compiling.
    """
    build = row.build

    def objective(x: Tensor, weights: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        return build().evaluate(TokenBatch.from_padded(x, weights, **inputs)).loss

    function = torch.compile(objective, fullgraph=True)
    inputs = {name: getattr(given, name) for name in row.reads}
    compiled_work = work(lambda x: function(x, given.mask, inputs), given.logprobs)
    compiled_work()
    return compiled_work


def hand_compiled(row: Row, given: Inputs) -> Work:
    """Return the hand-written loss in a compiled graph: what a compiler makes of it is the least that ours may take."""
    function = torch.compile(row.hand, fullgraph=True)
    compiled_work = work(lambda x: function(x, given), given.logprobs)
    compiled_work()
    return compiled_work


def works(row: Row, given: Inputs, with_compiled: bool) -> tuple[dict[str, Work], str | None]:
    """Return everything that is timed of one loss, by column, and why it does not compile if it does not."""
    loss, inputs = row.build(), {name: getattr(given, name) for name in row.reads}

    def padded(weights: Tensor) -> Work:
        return work(lambda x: loss.evaluate(TokenBatch.from_padded(x, weights, **inputs)).loss, given.logprobs)

    columns = {
        HAND: work(lambda x: row.hand(x, given), given.logprobs),
        "float mask": padded(given.mask),
        "bool mask": padded(given.mask.bool()),
        "packed": packed(row, given),
        "metrics read": metrics_read(loss, given, inputs),
    }
    if not with_compiled:
        return columns, None
    torch.compiler.reset()  # each loss and size is compiled by itself, so that none meets the limit of recompilations
    try:
        columns["compiled"] = compiled(row, given)
        if row.exact is None:
            columns[HAND_COMPILED] = hand_compiled(row, given)
    except Exception as error:  # anything a compiler raises is an answer here
        return columns, _reason(error)
    return columns, None


def _reason(error: Exception) -> str:
    """Return the first line, and the compiler's explanation of it where there is one."""
    lines = [line.strip() for line in str(error).splitlines()] or [""]
    explained = next((f" ({line})" for line in lines if line.startswith("Explanation: ")), "")
    return f"{type(error).__name__}: {lines[0]}{explained}"
