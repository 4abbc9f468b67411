"""RWKV halves weights in place for evaluation, which training must not see."""

from __future__ import annotations

from typing import Any

from .....errors import UnsupportedError

__all__ = ["keep_unscaled"]


def keep_unscaled(base: Any, quantized: bool) -> None:
    """Keep a model from dividing its own weights; what it has divided already is multiplied again.

    In evaluation mode RWKV divides the output matrices of every few layers by two, in place, and the hidden states too, so that
    half precision does not overflow. Its log-probs stay the same (an adapter's share of them does not), but what is trained and
    saved would be other weights than those that it loads.

    Args:
        base: of transformers, without a head; any other model is left alone.
        quantized: its weights are.

    Raises:
        UnsupportedError: its quantised weights have been divided.
    """
    if not hasattr(base, "_rescale_layers"):
        return
    if base.layers_are_rescaled:
        if quantized:
            raise UnsupportedError(
                f"{type(base).__name__} has run in evaluation mode, which has changed its quantized weights: load it anew"
            )
        base.train()
        base._rescale_layers()
    base.eval()._rescale_layers = _leave


def _leave() -> None:
    """Rescale nothing."""
