"""What every sampler does, whatever its model: check the prompts."""

from __future__ import annotations

from collections.abc import Sequence

from ..datums.types import ModelInput
from ..errors import DatumError, InvalidDatumsError

__all__ = ["check_prompts"]


def check_prompts(prompts: Sequence[ModelInput], n: int, vocab_size: int | None) -> None:
    """Check the prompts of one call.

    Raises:
        DatumError: there is no prompt, or no completion is asked for.
        InvalidDatumsError: a prompt is empty, is no `ModelInput`, or has tokens outside the vocabulary; lists all of them.
    """
    if n < 1:
        raise DatumError(f"n must be at least 1 completion per prompt, got {n}")
    if not prompts:
        raise DatumError("prompts is empty: give at least one ModelInput")
    problems = []
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, ModelInput):
            problems.append(f"prompt {i}: expected a ModelInput, got {type(prompt).__name__}; use ModelInput.from_ints")
        elif len(prompt) == 0:
            problems.append(f"prompt {i}: is empty; give at least one token")
        elif vocab_size is not None and not 0 <= int(prompt.tokens.min()) <= int(prompt.tokens.max()) < vocab_size:
            problems.append(f"prompt {i}: has token ids outside the vocabulary of {vocab_size}")
    if problems:
        raise InvalidDatumsError(problems)
