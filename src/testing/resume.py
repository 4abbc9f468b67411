"""Whether a checkpoint holds everything that the next step depends on."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..backends import TorchBackend

__all__ = ["verify_resume"]


def verify_resume(
    make: Callable[[], TorchBackend], step: Callable[[TorchBackend], object], *, name: str = "verify-resume"
) -> None:
    """Compare three runs after two steps and a third: uninterrupted, resumed, and resumed with a cold optimizer.

    Args:
        make: returns a fresh backend, the same each time; all share one ``checkpoint_dir``.
        step: makes one gradient call and one ``optim_step``, the same each time.
        name: of the checkpoint that is written (and overwritten).

    Raises:
        AssertionError: the resumed run differs from the uninterrupted one in any bit, or equals the cold one.
    """
    uninterrupted = make()
    for _ in range(2):
        step(uninterrupted)
    path = uninterrupted.save_state(name, overwrite=True).result().path
    step(uninterrupted)
    resumed, cold = make(), make()
    resumed.load_state_with_optimizer(path).result()
    cold.load_state(path).result()
    step(resumed)
    step(cold)
    assert _same(uninterrupted, resumed), "the resumed run's next step is not the uninterrupted run's"
    assert not _same(uninterrupted, cold), "a cold optimizer makes the same step: the optimizer state has no influence"


def _same(a: TorchBackend, b: TorchBackend) -> bool:
    pairs = zip(a.model.parameters(), b.model.parameters(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)
