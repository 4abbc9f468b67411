"""What was judged by hand, from the source of each project: why a property fails, and whether that is meant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, final

__all__ = ["ON_AVERAGE", "REPAIRED", "SETTINGS", "Judgement", "judgement"]


@final
@dataclass(frozen=True)
class Judgement:
    """Why a property fails.

    Attributes:
        mark: ``defect``, ``edge`` or ``choice``; `page` says what they are.
        sentence: what is seen in the source.
    """

    mark: Literal["defect", "edge", "choice"]
    sentence: str


def _all(properties: str, judged: Judgement) -> dict[str, Judgement]:
    return dict.fromkeys(properties.split(), judged)


_MULTIPLIES: Final = Judgement(
    "edge",
    "Masked values are multiplied by 0, or selected after they were computed: NaN or inf in a masked position gets "
    "through.",
)
_OVERFLOWS: Final = Judgement(
    "edge",
    "An exp without a bound: where a log-ratio is beyond its range (88 in fp32), the value or the gradient is inf "
    "or NaN, also where the clip would make it 0.",
)
_NOTHING: Final = Judgement(
    "edge", "0/0 where nothing is trained, unless the caller gives the count of the whole step, as the trainer may."
)
_CAPPED: Final = Judgement(
    "defect",
    "`epsilon_high`, 0.2 by default, is an absolute bound of the ratio in this loss, not an offset from 1. So every "
    "ratio that occurs is cut to 0.2: the loss is REINFORCE at a fifth of its step, and the old log-probs have no "
    "influence. With 5, which the documentation recommends, the property holds.",
)
_IN_PLACE: Final = Judgement(
    "defect",
    "`use_weighting` multiplies the losses in place. The losses of `sft` are one expanded number, and those of "
    "`hinge` are what the backward of relu has saved, so both raise a RuntimeError. With `sigmoid` it works.",
)
_RAISES: Final = (
    "differences direction influence inputs untrained poison permutation layouts splits weights_once scale extremes "
    "alive precision few nothing_trained deterministic stateless pure metrics"
)
_MIXED: Final = Judgement(
    "choice",
    "A mean over pairs plus a mean over the chosen tokens, both of the micro-batch: no one count divides it, so a "
    "step that is cut into micro-batches is another step.",
)
_SORTED: Final = Judgement(
    "choice",
    "AOT sorts the log-ratios of its batch, as published. The batch is the micro-batch of one device, so the loss "
    "depends on memory settings; the trainer accumulates it like a mean over pairs.",
)
_ODDS: Final = Judgement(
    "edge",
    "log(1 - exp(x)) at x = 0, or so near that it rounds to it: TRL's two branches lack safe inputs, so the "
    "gradient is NaN; Liger's one branch is -inf. A confident answer of few tokens is enough in fp32.",
)
_PROMPT: Final = Judgement(
    "choice",
    "The NLL is taken over prompt and response; a comment says so. What is masked is trained by it, and is not "
    "poison-proof.",
)
_CLAMPED: Final = Judgement(
    "defect",
    "The estimate is clamped to 10, so its gradient is exactly 0 where the reference is more than 14 times likelier "
    "than the policy (2.62 nats): the penalty is off where it is needed most. With `k3+` in verl only the reported "
    "value is clamped.",
)
_K1: Final = Judgement(
    "choice",
    "k1 in the loss, offered by that name: its gradient is a constant, and 0 on average, whatever the reference is. "
    "verl's docstring says that k1 and k3 do not have the gradient of the KL, and offers forms with a `+` that have it.",
)
_COVARIANCE: Final = Judgement(
    "choice",
    "Tokens are selected by their covariance within the batch, as published, at random among the candidates: the "
    "batch is the micro-batch, so the result depends on memory settings, and log-probs count by themselves.",
)
_PADDED_WIDTH: Final = Judgement(
    "choice",
    "Without `loss_scale_factor` it divides by the padded width of the micro-batch; its documentation asks for a "
    "constant.",
)
_LUSPO: Final = Judgement(
    "defect",
    "LUSPO multiplies by the length and then averages over all positions, without the mask: at token level, or with "
    "a KL, masked tokens are trained, and the width of the padding divides. At sequence level it is right. TRL "
    "masks before it aggregates.",
)
_KL_WIDTH: Final = Judgement(
    "defect",
    "The KL is a plain mean over all positions of the tensor, masked ones as zeros, while the policy's term is a "
    "mean over trained tokens: the share of padding scales `kl_to_ref_coeff`.",
)
_CISPO: Final = Judgement(
    "defect",
    "`-clip(ratio) * advantage`, as its docstring has it: a clipped token has no gradient at all, on both sides and for "
    "both signs. The paper that it cites takes the clipped ratio as a constant weight of `A logprob`, in order that "
    "clipped tokens keep a gradient; `-clip(ratio) A` is expected.",
)
_TOKEN_GSPO: Final = Judgement(
    "defect",
    "`gspo` takes the ratio of each token, with the range that GSPO has for the mean over a sequence: nearly every "
    "token that has moved is clipped. The kind is measured as token, and the gradient is not GSPO's.",
)
_BF16_RANGE: Final = Judgement(
    "edge",
    "The log-probs are computed from logits in their own dtype: in bf16 they are off by far more than this clip range, "
    "so that tokens are clipped on policy.",
)
_REFUSES: Final = Judgement("choice", "NaN in old log-probs is refused, in masked positions too.")
_K3_REWARD: Final = Judgement(
    "defect",
    "The default estimate for distillation is k3, whose opposite is the advantage: it is never positive, and clamped at "
    "10, so that beyond 2.62 nats the teacher has no influence. On average it trains neither KL (see below); k1 as an "
    "advantage is exact.",
)
_TEACHER: Final = Judgement(
    "defect",
    "The joint loss adds the mean of `logprobs - teacher`, which is k1: the teacher has no influence on the "
    "gradient, whose mean is 0. Distillation alone (`rl_loss_weight` 0) is right.",
)
_DISCOPOP: Final = Judgement(
    "choice",
    "As published: where policy and reference agree, the slope of DiscoPOP's blend is positive, so that a chosen "
    "response becomes less likely there.",
)

_EVERYWHERE: Final = {"poison": _MULTIPLIES, "extremes": _OVERFLOWS, "nothing_trained": _NOTHING}
_BY_NAME: Final[Mapping[tuple[str, str], Mapping[str, Judgement]]] = {
    ("TRL", "cispo, default epsilon_high"): {"inputs": _CAPPED},
    ("Liger", "cispo, default epsilon_high"): {"inputs": _CAPPED},
    ("TRL", "dpo, aot"): _all("kind shift splits", _SORTED),
    ("TRL", "dpo, aot_unpaired"): _all("kind shift splits", _SORTED),
    ("TRL", "dpo, apo_down"): _all(
        "alive",
        Judgement(
            "choice",
            "As published: where policy and reference agree, APO-down's two terms cancel for the chosen response.",
        ),
    ),
    ("TRL", "dpo, discopop"): {
        **_all("direction", _DISCOPOP),
        "extremes": Judgement(
            "edge",
            "exp of the margin overflows where its weight has underflown: 0 * inf is NaN from a margin of -89 in fp32.",
        ),
    },
    ("TRL", "dpo, sft"): _all(
        "influence inputs alive splits",
        Judgement(
            "choice",
            "An NLL of the chosen responses, a mean over the chosen tokens of the micro-batch; the others have no "
            "part in it.",
        ),
    ),
    ("TRL", "dpo, sigmoid, forward_kl"): {
        "extremes": Judgement(
            "edge", "exp(-log-ratio) overflows from -88 in fp32; only the alpha divergence is clamped."
        )
    },
    ("TRL", "dpo, hinge, use_weighting (WPO)"): _all(_RAISES, _IN_PLACE),
    ("TRL", "dpo, sft, use_weighting (WPO)"): _all(_RAISES, _IN_PLACE),
    ("TRL", "orpo"): {**_all("untrained poison", _PROMPT), **_all("splits", _MIXED)},
    ("TRL", "orpo, odds ratio alone"): _all("extremes", _ODDS),
    ("Liger", "orpo, odds ratio alone"): _all("extremes", _ODDS),
    ("TRL", "cpo"): _all("splits", _MIXED),
    ("TRL", "simpo"): _all("splits", _MIXED),
    ("Liger", "orpo"): _all("splits", _MIXED),
    ("Liger", "cpo"): _all("splits", _MIXED),
    ("Liger", "luspo, token level"): _all("untrained layouts splits", _LUSPO),
    ("verl", "vanilla, seq-mean-token-sum-norm"): _all("layouts splits", _PADDED_WIDTH),
    ("verl", "gpg"): _all(
        "inputs", Judgement("choice", "A plain policy gradient, which takes old log-probs as all do, and needs none.")
    ),
    ("verl", "clip_cov"): _all("scale precision splits shift deterministic permutation", _COVARIANCE),
    ("verl", "kl_cov"): _all("scale precision splits shift permutation kind", _COVARIANCE),
    ("SkyRL", "clip_cov"): _all("scale precision splits shift deterministic permutation", _COVARIANCE),
    ("SkyRL", "kl_cov"): _all("scale precision splits shift permutation kind", _COVARIANCE),
    ("verl", "KL alone, k1"): _all("information", _K1),
    ("SkyRL", "KL alone, k1"): _all("information", _K1),
    ("verl", "KL alone, k3"): _all("alive", _CLAMPED),
    ("SkyRL", "KL alone, k3"): _all("alive", _CLAMPED),
    ("torchrl", "GRPOLoss, kl_to_ref_coeff 0.04"): _all("layouts splits", _KL_WIDTH),
    ("torchrl", "CISPOLoss"): _all("closed_form", _CISPO),
    ("Hatchery", "gspo"): {**_all("closed_form", _TOKEN_GSPO), **_all("precision", _BF16_RANGE)},
    ("verl", "distillation by policy gradient, k3 (default)"): _all("alive", _K3_REWARD),
    ("AReaL", "distillation, joint (KDRL)"): {**_all("information", _TEACHER), **_all("poison", _REFUSES)},
    ("AReaL", "distillation alone"): _all("poison", _REFUSES),
}
ON_AVERAGE: Final = """The expected gradient of each KL, on policy, against that of KL(policy || reference), by
enumeration of a softmax policy of four tokens. *zero* says nothing about the reference; *biased* is the gradient of
something else: of KL(reference || policy) for k3 in the loss, and of the difference of both for k3 as an advantage,
verl's default for distillation. torchrl's documentation says so of its own. TRL's default and Liger's
`use_bias_correction_kl` multiply k3 by the ratio, and are exact."""
SETTINGS: Final = """A setting that is taken and does nothing is not seen by any property, so these were tried by
themselves: the same numbers, without it and with it. TRL's `sigmoid` was smoothed in earlier versions, and torchtune's
is. verl's docstring says that `geo_mean` does not use its `loss_agg_mode`."""
REPAIRED: Final[Sequence[str]] = (
    "verl 0.9.1 bounds the log-ratio of its `vanilla` loss before exp: `extremes` holds.",
    "verl 0.9.1 divides `seq-mean-token-sum-norm` by the number of sequences too, which an earlier version forgot "
    "(verl-project/verl#3741).",
    "SkyRL 0.4.0's KL has a gradient that knows the reference (NovaSky-AI/SkyRL#1340): `information` holds for k2 "
    "and k3. Its k3 selects masked positions (NovaSky-AI/SkyRL#1635): `poison` holds.",
    "TRL 1.16.0 masks LUSPO before it aggregates: `untrained` and `layouts` hold, where Liger's has the defect above.",
    "TRL 1.16.0 corrects its KL by the ratio by default: exact, where plain k3 is biased.",
)


def judgement(peer: str, name: str, failed: str) -> Judgement | None:
    """Return what was found out about a failure; None if nobody has looked at it."""
    return _BY_NAME.get((peer, name), {}).get(failed) or _EVERYWHERE.get(failed)
