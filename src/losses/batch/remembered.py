"""What has been computed of a batch already, by name in plain dictionaries, into which a compiler can look."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

from torch import Tensor

from .selection import transformed, wide

__all__ = ["forget_overwritten", "kept_sum", "written_into"]

_VERSIONS: Final = "versions"


def forget_overwritten(found: dict[str, Any], inputs: Iterable[Tensor]) -> None:
    """Forget what was computed of inputs into whose memory something else has been written since.

    Compiled and under transforms nothing is known of that, and everything is kept.
    """
    if transformed():
        return
    versions = tuple(0 if x.is_inference() else x._version for x in inputs)
    if found.setdefault(_VERSIONS, versions) != versions:
        found.clear()
        found[_VERSIONS] = versions


def kept_sum(kept: dict[str, Tensor], name: str, logprobs: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a sum over log-probs, of fp32 or better; one that was computed before will do, unless a graph is wanted."""
    if name in kept and not logprobs.requires_grad and not written_into(kept[name]):
        return kept[name]
    sums = compute(wide(logprobs))
    kept[name] = sums.detach() if sums.requires_grad else sums
    return sums


def written_into(result: Tensor) -> bool:
    """Return whether the caller has written into a fresh result, or into a view of it, as ``loss /= 4`` does.

    Compiled, under transforms and in inference mode nothing is known of that.
    """
    return not transformed() and not result.is_inference() and result._version > 0
