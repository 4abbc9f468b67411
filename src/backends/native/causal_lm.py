"""What the native backend asks of a model: hidden states, and the head that turns them into logits."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from ...errors import BackendError
from ...ops.head import Head

__all__ = ["CausalLM", "Head", "as_causal_lm"]


@runtime_checkable
class CausalLM(Protocol):
    """An ``nn.Module`` with these two methods can be trained. Rows are sequences, or several packed end to end."""

    def hidden_states(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return the hidden states before the head, [R, L, H].

        Args:
            tokens: int64 [R, L].
            positions: int64 [R, L]; position of each token in its own sequence. Where it restarts at 0 within a row a
                new sequence begins, which must not see the one before. Where it falls back to P > 0 the sequence forks:
                what follows goes on after the first P tokens that were laid out from the last 0. A model that cannot do
                this is not given forks: both are probed at load.
        """
        ...

    def head(self) -> Head:
        """Return the output projection, its parameters live (not copies)."""
        ...


def as_causal_lm(model: Any) -> CausalLM:
    """Return the model, if it is one.

    Raises:
        BackendError: it lacks the two methods.
    """
    if not isinstance(model, nn.Module) or not isinstance(model, CausalLM):
        raise BackendError(
            f"model must be an nn.Module with hidden_states(tokens, positions) and head(), got {type(model).__name__}; "
            "a transformers model is wrapped by pullback.backends.HFModel(model), or loaded by TorchBackend.from_pretrained"
        )
    return model
