"""What every sampler does, whatever its model: check the prompts, and draw from logits."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Self, final

import torch
from torch import Tensor

from ..datums.types import ModelInput
from ..errors import ConfigError, DatumError, InvalidDatumsError
from .types import SamplingParams

__all__ = ["RowParams", "check_params", "check_prompts", "choose_tokens", "drawn_seed", "row_uniforms"]


def row_uniforms(seed: int, row: int) -> random.Random:
    """Return the random numbers of one completion of a prompt, by its place among them: its own, whatever others do."""
    return random.Random(f"{seed}:{row}")


def drawn_seed(generator: torch.Generator) -> int:
    """Return the next seed of a backend's running generator, for a prompt without one."""
    return int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))


def check_params(params: SamplingParams, vocab_size: int | None) -> None:
    """Check the parameters of one call.

    Raises:
        ConfigError: they are none, or a token to stop at is outside the vocabulary.
    """
    if not isinstance(params, SamplingParams):
        raise ConfigError(f"sample needs SamplingParams, got {type(params).__name__}")
    outside = [token for token in params.stop or () if vocab_size is not None and token >= vocab_size]
    if outside:
        raise ConfigError(
            f"stop has {outside[:5]}, outside the vocabulary of {vocab_size}: no completion would end there"
        )


def check_prompts(
    prompts: Sequence[ModelInput],
    n: int,
    vocab_size: int | None,
    context: int | None = None,
    max_tokens: int = 1,
) -> None:
    """Check the prompts of one call.

    Args:
        prompts: at least one.
        n: completions of each.
        vocab_size: token ids are below it; None = not known.
        context: longest text of the model, tokens; None = no limit.
        max_tokens: longest completion.

    Raises:
        DatumError: there is no list of prompts, or no completion is asked for.
        InvalidDatumsError: a prompt is empty, is no `ModelInput`, has tokens outside the vocabulary, or leaves the context;
            lists all of them.
    """
    if isinstance(n, bool) or not isinstance(n, Integral):
        raise DatumError(f"n must be a whole number of completions per prompt, got {n!r}")
    if n < 1:
        raise DatumError(f"n must be at least 1 completion per prompt, got {n}")
    if isinstance(prompts, (ModelInput, str)) or not isinstance(prompts, Sequence):
        raise DatumError(f"prompts must be a list of ModelInput, got {type(prompts).__name__}; for one: [prompt]")
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
        elif context is not None and len(prompt) + max_tokens - 1 > context:
            problems.append(
                f"prompt {i}: {len(prompt)} tokens and max_tokens={max_tokens} leave the model's context of {context} tokens"
            )
    if problems:
        raise InvalidDatumsError(problems)


@final
@dataclass(frozen=True, eq=False)
class RowParams:
    """How each of R rows is drawn.

    Attributes:
        temperature: [R], in the logits' dtype, at least its smallest normal number.
        greedy: bool [R]; rows that take the most probable token.
        top_k: (rows, how many tokens they keep) of the rows that keep only some, int64.
        top_p: (rows, the mass they keep) of the rows that keep less than all.
        untempered: no row's distribution is other than the model's, but for its cuts.
    """

    temperature: Tensor
    greedy: Tensor
    top_k: tuple[Tensor, Tensor]
    top_p: tuple[Tensor, Tensor]
    untempered: bool

    @classmethod
    def of(cls, params: Sequence[SamplingParams], like: Tensor) -> Self:
        """Lay out the parameters of rows whose logits are in dtype and on the device of ``like``."""
        temperatures = torch.tensor([p.temperature or 1.0 for p in params], dtype=torch.float64)
        kept = [(i, p.top_k) for i, p in enumerate(params) if p.top_k != -1 and p.temperature > 0]
        masses = [(i, p.top_p) for i, p in enumerate(params) if p.top_p < 1.0 and p.temperature > 0]
        device = like.device
        return cls(
            temperature=temperatures.clamp(min=torch.finfo(like.dtype).tiny).to(like.dtype).to(device),
            greedy=torch.tensor([p.temperature == 0 for p in params], device=device),
            top_k=(_column(kept, 0, torch.int64, device), _column(kept, 1, torch.int64, device)),
            top_p=(_column(masses, 0, torch.int64, device), _column(masses, 1, like.dtype, device)),
            untempered=all(p.temperature in (0.0, 1.0) for p in params),
        )

    def tempered(self, logits: Tensor) -> Tensor:
        """Return logits [R, V] of the tempered distributions; where a temperature is all but zero they do not overflow."""
        if self.untempered:
            return logits
        return (logits - logits.amax(-1, keepdim=True)) / self.temperature[:, None]


def _column(pairs: Sequence[tuple[int, float]], place: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor([pair[place] for pair in pairs], dtype=dtype, device=device)


def choose_tokens(logits: Tensor, params: RowParams, uniforms: Sequence[float]) -> Tensor:
    """Choose one token per row from its tempered, cut distribution, by inverting its distribution function.

    Args:
        logits: [R, V].
        params: of the rows.
        uniforms: a number in [0, 1) for each row; what a row chooses depends on its own logits, parameters and number only.

    Returns:
        Tokens, int64 [R].
    """
    best = logits.argmax(-1)
    if bool(params.greedy.all()):
        return best
    cut = _nucleus(_top(params.tempered(logits), *params.top_k), *params.top_p)
    mass = _wide(cut.softmax(-1)).cumsum(-1)
    points = torch.tensor(list(uniforms), dtype=mass.dtype).to(mass.device)[:, None] * mass[:, -1:]
    drawn = torch.searchsorted(mass, points, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    return torch.where(params.greedy, best, drawn)


def _wide(probabilities: Tensor) -> Tensor:
    """In fp64, where the device has it: the sum over a vocabulary must not lose the rare tokens."""
    return probabilities if probabilities.device.type == "mps" else probabilities.double()


def _top(logits: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
    """Keep each of these rows' most probable tokens, as many as it says, and what is equal to the last of them."""
    if not rows.numel():
        return logits
    most = min(int(counts.max()), logits.shape[-1])
    found = logits[rows]
    smallest = found.topk(most, -1).values.gather(-1, counts.clamp(max=most)[:, None] - 1)
    return logits.index_copy(0, rows, found.masked_fill(found < smallest, -torch.inf))


def _nucleus(logits: Tensor, rows: Tensor, masses: Tensor) -> Tensor:
    """Keep each of these rows' smallest set of tokens whose probability reaches its mass; at least one."""
    if not rows.numel():
        return logits
    found = logits[rows]
    ordered, order = found.sort(-1, descending=True)
    mass_before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    cut = torch.zeros_like(found, dtype=torch.bool).scatter(-1, order, mass_before >= masses[:, None])
    return logits.index_copy(0, rows, found.masked_fill(cut, -torch.inf))
