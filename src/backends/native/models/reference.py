"""A second model that only scores, beside one that is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self, final

from torch import Tensor, nn

from ....datums.validation import validate
from ....errors import ConfigError, InvalidDatumsError
from ...calls.prepared import PreparedCall
from ..causal_lm import CausalLM, as_causal_lm
from ..dtensors import local_part
from ..execution.forward import trainable
from .facts.model_facts import ModelFacts
from .facts.probes import LayoutLimits, layout_limits, require_causal
from .facts.quantized import plain_tensors

__all__ = ["FrozenReference"]


@final
@dataclass(frozen=True, eq=False)
class FrozenReference:
    """A frozen model, and what may be asked of it.

    Attributes:
        model: the model.
        vocab_size: token ids are below it.
        max_length: longest datum, tokens; None = no limit.
        layouts: in which it keeps sequences of one forward apart.
    """

    model: CausalLM
    vocab_size: int
    max_length: int | None
    layouts: LayoutLimits

    @classmethod
    def of(cls, reference: nn.Module, trained: nn.Module, max_length: int | None) -> Self:
        """Freeze a model, and probe it as the one that is trained.

        Args:
            reference: whole, not sharded.
            trained: the model that it is the reference of.
            max_length: longest datum that a user has named, tokens; None = the context that the model was made for.

        Raises:
            ConfigError: it has weights of the model that is trained.
            LeakyModelError: it sees the future.
        """
        _require_own_weights(reference, trained)
        model = as_causal_lm(reference.eval().requires_grad_(False))
        vocab = int(model.head().weight.shape[0])
        require_causal(model, vocab)
        context = getattr(reference, "facts", ModelFacts()).max_length if max_length is None else max_length
        return cls(model, vocab, context, layout_limits(model, vocab))

    def require_scorable(self, call: PreparedCall) -> None:
        """Check the data of a call, which the trained model can score.

        Raises:
            InvalidDatumsError: a token is not in this model's vocabulary, or a datum is too long for it.
        """
        try:
            validate(call.data, vocab_size=self.vocab_size, max_length=self.max_length)
        except InvalidDatumsError as error:
            raise InvalidDatumsError([f"for the reference, {problem}" for problem in error.problems]) from error


def _require_own_weights(reference: nn.Module, trained: nn.Module) -> None:
    changing = {place for p in trainable(trained).values() for place in _storages(p)}
    shared = [name for name, p in reference.named_parameters() if changing & _storages(p)]
    if shared:
        raise ConfigError(
            f"reference has {len(shared)} weights of the model itself that are trained ({', '.join(shared[:3])}"
            f"{', ...' if shared[3:] else ''}): it would change with it; give a copy of its own (copy.deepcopy)"
        )


def _storages(p: Tensor) -> set[int]:
    return {plain.untyped_storage().data_ptr() for plain in plain_tensors(local_part(p))} - {0}
