"""How biased estimators are, as a page: ``python -m pullback.testing.estimator_tables > docs/estimators.md``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, final

import torch
from torch import Tensor

from ..losses import CISPO, DRO, GRPO, GSPO, KL, PPO, Correction, ImportanceSampling, Rejection, TokenBatch
from ..losses.functional import kl_penalty
from .enumerate import (
    Bias,
    Draws,
    Estimator,
    SmallPolicy,
    as_estimator,
    bias_table,
    forward_kl,
    group_baseline,
    markdown,
    negative_reward,
    reverse_kl,
    truncated,
)

__all__ = ["EstimatorTable", "estimator_page", "estimator_tables"]

_STALE: Final = 0.5  # how far the sampler's logits are from the policy's
_GROUP: Final = 4


@final
@dataclass(frozen=True)
class EstimatorTable:
    """One table of the page.

    Attributes:
        title: its heading.
        words: what was enumerated, and what the table says.
        rows: of `bias_table`.
    """

    title: str
    words: str
    rows: tuple[Bias, ...]


def estimator_tables(seed: int = 0) -> list[EstimatorTable]:
    """Return the tables, with policies, samplers, references and rewards drawn from a seed."""
    kls = [_kl_on_policy(seed), _kl_off_policy(seed)]
    return [*kls, _advantages(seed), *_corrections(seed), *_samplers(seed), _losses(seed)]


def estimator_page(seed: int = 0) -> str:
    """Return the tables as Markdown."""
    parts = [_HEAD]
    for table in estimator_tables(seed):
        parts.append(f"## {table.title}\n\n{table.words}\n\n{markdown(table.rows)}\n")
    return "\n".join(parts)


def _ratio(draws: Draws) -> Tensor:
    """The detached ratio of policy to sampler of each answer, [M, 1]."""
    return (draws.logprobs - draws.rollout_logprobs).sum(-1, keepdim=True).detach().exp()


def _score(draws: Draws, weights: Tensor | float) -> Tensor:
    """Return ``-w R logprob`` of each token: the policy gradient, weighted by constants."""
    return -weights * draws.rewards[:, None] * draws.logprobs


def _penalty(estimator: Any, gradient: Any, weigh: bool, draws: Draws) -> Tensor:
    terms = kl_penalty(draws.logprobs, draws.ref_logprobs, estimator, gradient)
    return _ratio(draws) * terms if weigh else terms


def _kl_on_policy(seed: int) -> EstimatorTable:
    draws = SmallPolicy.random(4, 1, seed=seed).draws()
    modes = [(e, "pathwise") for e in ("k1", "k2", "k3", "abs")] + [("any of them", "reverse")]
    named: dict[str, Estimator] = {
        f"{e}, {g}": partial(_penalty, "k3" if e == "any of them" else e, g, False) for e, g in modes
    }
    rows = [*bias_table(named, reverse_kl, draws), *bias_table(named, forward_kl, draws)]
    return EstimatorTable(
        "A KL in the loss, on policy",
        "One token of four, drawn by the policy. The pathwise gradient of k1 is 0 on average and that of k3 is the gradient of "
        "the *other* KL; k2's, and the mode `reverse` with any estimator, are the reverse KL's.",
        tuple(rows),
    )


def _kl_off_policy(seed: int) -> EstimatorTable:
    draws = SmallPolicy.random(4, 1, seed=seed, staleness=_STALE).draws()
    named: dict[str, Estimator] = {}
    for name, e, g in (("k2", "k2", "pathwise"), ("k3", "k3", "pathwise"), ("k3", "k3", "reverse")):
        named[f"{name}, {g}"] = partial(_penalty, e, g, False)
        named[f"{name}, {g}, times the ratio"] = partial(_penalty, e, g, True)
    return EstimatorTable(
        "A KL in the loss, off policy",
        "The same, drawn by a stale sampler. Only the ratio of policy to sampler repairs it, as `KL(importance=True)` does.",
        tuple(bias_table(named, reverse_kl, draws)),
    )


def _advantages(seed: int) -> EstimatorTable:
    draws = SmallPolicy.random(3, 1, seed=seed).draws(group=_GROUP)
    named: dict[str, Estimator] = {"the reward itself": lambda d: -d.rewards * d.logprobs.sum(-1)}
    named["less the mean (Dr. GRPO)"] = group_baseline(scale="none")
    named["less the mean of the others (RLOO)"] = group_baseline(baseline="leave_one_out", scale="none")
    named["less the mean, by the deviation (GRPO)"] = group_baseline()
    named["less the mean of the others, by the deviation"] = group_baseline(baseline="leave_one_out")
    return EstimatorTable(
        "Advantages in a group",
        f"Groups of {_GROUP}, one token of three each. The group's own mean shortens the gradient to (n - 1) / n, which is "
        f"{(_GROUP - 1) / _GROUP:g}; the mean of the others leaves it exact. Dividing by the deviation turns it: groups "
        "count by how alike their rewards are, and its length says nothing.",
        tuple(bias_table(named, negative_reward, draws)),
    )


def _weighted(correction: Correction | None, draws: Draws) -> Tensor:
    """Return the policy gradient of the recomputed policy, weighted for having been drawn by the sampler."""
    if correction is None:
        return _score(draws, 1.0)
    old = draws.logprobs.detach()
    batch = TokenBatch.from_padded(old, torch.ones_like(old), old_logprobs=old, rollout_logprobs=draws.rollout_logprobs)
    return _score(draws, correction.factor(batch))


_CORRECTIONS: Final[Mapping[str, Correction | None]] = {
    "none": None,
    "token, whole": Correction.tis(math.inf),
    "token, truncated at 1.2 (TIS)": Correction.tis(1.2),
    "token, masked outside 0.8 to 1.2 (IcePop)": Correction.masked(0.8, 1.2),
    "sequence, whole": Correction.tis(math.inf, level="sequence"),
    "sequence, truncated at 1.2": Correction.tis(1.2, level="sequence"),
    "sequence, masked outside 0.8 to 1.2": Correction.masked(0.8, 1.2, level="sequence"),
    "geometric mean, whole": Correction.tis(math.inf, level="geometric"),
    "filter: geometric mean within 0.7 to 1.3": Correction.rejection(Rejection("ratio", "mean", 0.7, 1.3)),
}


def _corrections(seed: int) -> list[EstimatorTable]:
    named: dict[str, Estimator] = {name: partial(_weighted, one) for name, one in _CORRECTIONS.items()}
    words = {
        1: "One token of three, drawn by a sampler that is not the policy. Any whole ratio is exact; what is truncated, masked "
        "or filtered is biased, and so is no correction at all.",
        3: "Three tokens. Only the product over the sequence is exact: weights of single tokens leave the other tokens to the "
        "sampler's distribution, and a geometric mean is no ratio of probabilities.",
    }
    tables = []
    for length, text in words.items():
        draws = SmallPolicy.random(3, length, seed=seed, staleness=_STALE).draws()
        rows = tuple(bias_table(named, negative_reward, draws))
        tables.append(EstimatorTable(f"Corrections, answers of {length} token{'s' * (length > 1)}", text, rows))
    return tables


def _sampled(policy: SmallPolicy, sampler: Tensor, recorded: Tensor, weigh: bool) -> tuple[Estimator, Draws]:
    """Return a policy gradient, and what a sampler draws while it records other log-probs."""
    drawn = replace(policy, rollout=sampler).draws()
    position = sampler.isfinite().nonzero()[:, 1]
    draws = replace(drawn, rollout_logprobs=recorded[:, position].T)
    return (lambda d: _score(d, _ratio(d) if weigh else 1.0)), draws


def _samplers(seed: int) -> list[EstimatorTable]:
    policy = SmallPolicy.random(5, 1, seed=seed)
    whole = policy.logits.log_softmax(-1)
    cut = {"top-p 0.9": {"top_p": 0.9}, "top-p 0.7": {"top_p": 0.7}, "top-k 2": {"top_k": 2}}
    rows = []
    for name, options in cut.items():
        sampler = truncated(whole, **options)  # type: ignore[arg-type]
        rows += _compared(name, policy, sampler, {"those of the sampler": sampler, "those before the cut": whole})
    hot = []
    for temperature in (0.7, 1.3):
        sampler = (whole / temperature).log_softmax(-1)
        recorded = {"those of the sampler": sampler, "those at temperature 1": whole}
        hot += _compared(f"temperature {temperature:g}", policy, sampler, recorded)
    return [
        EstimatorTable(
            "Truncated sampling",
            "One token of five, the policy's own but for the cut. With the sampler's log-probs every ratio is the mass that "
            "was kept, with those from before it 1; neither brings back what was never drawn, so that no row is exact.",
            tuple(rows),
        ),
        EstimatorTable(
            "Temperature",
            "One token of five, drawn at another temperature than the policy is trained at. With the sampler's own log-probs "
            "the ratio is exact; with those of temperature 1 every ratio is 1.",
            tuple(hot),
        ),
    ]


def _compared(name: str, policy: SmallPolicy, sampler: Tensor, recorded: Mapping[str, Tensor]) -> list[Bias]:
    """Return the rows of one sampler: without a ratio, and with the ratio to each kind of log-probs."""
    variants: dict[str, tuple[Tensor, bool]] = {f"{name}, no ratio": (sampler, False)}
    variants |= {f"{name}, ratio to {of}": (logprobs, True) for of, logprobs in recorded.items()}
    exact: Callable[[Draws], Tensor] = lambda _: negative_reward(policy.draws())  # noqa: E731
    exact.__name__ = "negative_reward"
    rows = []
    for label, (logprobs, weigh) in variants.items():
        estimator, draws = _sampled(policy, sampler, logprobs, weigh)
        rows += bias_table({label: estimator}, exact, draws)
    return rows


def _losses(seed: int) -> EstimatorTable:
    draws = SmallPolicy.random(3, 2, seed=seed, staleness=_STALE).draws()
    losses = {
        "importance_sampling": ImportanceSampling(),
        "ppo, 0.2": PPO(),
        "cispo, up to 5": CISPO(),
        "gspo": GSPO(),
        "dro, 0.05": DRO(),
        "grpo with a KL, k3 and 0.1": GRPO(kl=KL("k3", 0.1), aggregation="sum"),
    }
    named = {name: as_estimator(loss) for name, loss in losses.items()}
    return EstimatorTable(
        "Policy losses on stale samples",
        "Two tokens of three, each loss with its defaults, rewards as advantages. None of them has the ratio of whole answers, "
        "which at more than one token is a bias that is accepted for its variance; clips and added terms come on top.",
        tuple(bias_table(named, negative_reward, draws)),
    )


_HEAD: Final = """\
# What estimators are on average

On a softmax policy of a few tokens every expectation is a sum, so that a bias is a number and no argument. Each table
compares the expected gradient of an estimator with its target: `size` is its length over that of the target, `error` that of
the difference, `cosine` that of the angle. `exact` is unbiased, `scaled` has the right direction, `zero` carries no
information. The policies, samplers, references and rewards are random (seed 0); the tests hold the page to its code and the
verdicts to other seeds. For estimators of your own: `pullback.testing.enumerate`, in [check a loss](checking.md). This page
is made by `python -m pullback.testing.estimator_tables`.
"""

if __name__ == "__main__":
    print(estimator_page(), end="")
