"""What the native backend asks of a model: hidden states, and the head that turns them into logits."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from ...ops.head import Head

__all__ = ["CausalLM", "Head"]


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
