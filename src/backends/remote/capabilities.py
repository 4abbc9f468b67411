"""What a service can do by itself; the rest is done here."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, final

import torch
from torch import Tensor

from ...datums.types import Datum, TensorData
from ...errors import UnsupportedError
from ...losses.base import Loss
from ...losses.config import config_keys
from ...losses.registry import config_of
from .connection.probe import ask_capabilities

__all__ = ["PROTOCOL_LOSSES", "Capabilities", "detect", "named_config", "named_data"]

_logger = logging.getLogger(__name__)
PROTOCOL_LOSSES: Final = frozenset({"cross_entropy", "importance_sampling", "ppo"})
_PROTOCOL_KEYS: Final = frozenset({"clip_low_threshold", "clip_high_threshold"})  # others would be ignored, or refused


_FLAGS: Final = ("normalizes", "takes_divisor", "keeps_graphs", "starts_at_base")  # that a service of ours says


@final
@dataclass(frozen=True)
class Capabilities:
    """What a service computes by name, and what its optimizer step can divide by.

    Args:
        losses: names of losses that it computes as this library defines them.
        divides: it knows means: it divides what has accumulated once, by the total count. Otherwise only sums go by name.
        normalizes: its ``optim_step`` takes ``grad_accumulation_normalization``.
        takes_divisor: its ``optim_step`` divides by a number that it is told, so that means whose counts are known here may be
            many calls.
        weighs: its policy losses read ``weights``; otherwise these are multiplied into the advantages.
        max_length: longest datum, tokens; None = not known.
        max_weight_sum: largest sum of weights up to which its cross-entropy is a sum (a mean clamped at 1: 1.0); None = any.
        keeps_graphs: the forward of a custom loss waits for its backward, so that there is no second one.
        starts_at_base: a new adapter changes nothing, to the bit, so that a model that is never trained is the reference, and
            scores a whole call at once; otherwise the reference is a sampler, which is asked for each datum.
    """

    losses: frozenset[str] = PROTOCOL_LOSSES
    divides: bool = False
    normalizes: bool = False
    takes_divisor: bool = False
    weighs: bool = False
    max_length: int | None = None
    max_weight_sum: float | None = None
    keeps_graphs: bool = False
    starts_at_base: bool = False

    def knows(self, loss: Loss) -> bool:
        """Whether this loss, given by name, goes by name."""
        if loss.name not in self.losses:
            return False
        return self.divides or not (loss.main_aggregation.is_mean or set(config_of(loss) or ()) - _PROTOCOL_KEYS)

    def require_fits(self, cotangents: Sequence[Tensor]) -> None:
        """Check weights before they are sent, as the service may cut a call between any two datums.

        Raises:
            UnsupportedError: they could add up to more than the service takes as they are.
        """
        most = sum(max(0.0, -float(cotangent.sum())) for cotangent in cotangents)
        if self.max_weight_sum is not None and most > self.max_weight_sum * (1 + 1e-6):
            raise UnsupportedError(
                f"the weights that carry this loss add up to {most:.6g}, and the service divides by what is beyond "
                f"{self.max_weight_sum:g}: use a mean instead of a sum, or scale the loss, eps and grad_clip_norm of the whole "
                "run by one small number, which AdamW does not see"
            )


def detect(url: str, key: str, base_model: str, plain: Capabilities | None = None) -> Capabilities:
    """Ask a service what it can do beyond the ``plain`` protocol; one that does not say can do nothing more.

    The SDK's own types leave out what they do not know, so this one question is asked without it. It is the first one, so
    that nobody waits for the minutes that the SDK goes on calling where there is no service.

    Raises:
        RemoteError: nobody answers at this address, only the network's failures do, or what answers is something else.
    """
    plain = plain or Capabilities()
    said = ask_capabilities(url, key)
    if said is None:
        _logger.info("%s does not say what it can do: taken to speak the plain protocol", url)
        return plain
    lengths = [m.get("max_context_length") for m in said["supported_models"] if m.get("model_name") == base_model]
    capabilities = replace(plain, max_length=next((n for n in lengths if isinstance(n, int)), None))
    ours = said.get("pullback")
    if not isinstance(ours, dict) or not isinstance(ours.get("losses"), list):
        return capabilities
    flags = {name: bool(ours.get(name, False)) for name in _FLAGS}
    return replace(capabilities, losses=frozenset(ours["losses"]), divides=True, weighs=True, **flags)


def named_config(loss: Loss, capabilities: Capabilities) -> dict[str, Any]:
    """Return the config of a loss that goes by name. A plain service is told its clip range even where that is the
    default: the protocol has the keys, and services differ in their defaults."""
    config = config_of(loss) or {}
    if capabilities.divides:
        return config
    return {k: v for k, v in config_keys(type(loss)).items() if k in _PROTOCOL_KEYS} | config


def named_data(data: Sequence[Datum], loss: Loss, capabilities: Capabilities) -> list[Datum]:
    """Return the datums with the inputs that a loss reads, and no others: the rest never leaves this machine."""
    wanted: set[str] = {"target_tokens", *loss.required_inputs, *loss.optional_inputs}
    selected = []
    for datum in data:
        inputs = {k: v for k, v in datum.loss_fn_inputs.items() if k in wanted}
        if "advantages" in inputs and "weights" in inputs and not capabilities.weighs:
            # Exact: these losses are positively homogeneous in the advantage, and weights are not negative.
            weights = inputs.pop("weights").to_torch()
            given = {key: inputs[key].to_torch() for key in ("advantages", "logprobs") if key in inputs}
            # A ratio may overflow where nothing is trained, and inf * 0 is NaN: what is masked here is nothing there.
            told = {key: torch.where(weights == 0, 0.0, x) for key, x in given.items()}
            told["advantages"] = told["advantages"] * weights
            inputs |= {key: TensorData(x.to(torch.float32)) for key, x in told.items()}
        selected.append(Datum(datum.model_input, inputs))
    return selected
