"""Whether a model trains as itself: log-probs, gradients, adapters, reference, sampling, checkpoints against its own code."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor

from ...backends.native.backend import TorchBackend
from ...backends.native.decoding.agreement import cache_agrees
from ...backends.native.models.facts.model_facts import ModelFacts
from ...backends.native.models.facts.probing import perturbed_adapters
from ...backends.native.models.facts.quantized import is_quantized, require_adapter
from ...backends.native.models.hf import HFModel
from ...backends.reference import with_reference
from ...backends.types import AdamParams, SamplingParams
from ...datums.builders import datum_from_prompt_completion
from ...datums.types import Datum, ModelInput
from ...errors import ConfigError, InvalidDatumsError, UnsupportedError, suggestion
from .layouts import using_layout
from .own_forward import own_logprobs, own_logprobs_of
from .rows import CAUSES, Found, ModelRow, largest_difference, row, scored, trained_share, verdict_on

__all__ = ["ModelRow", "check_model"]

_TOLERANCE: Final = 1e-4  # nats, fp32
_HALF: Final = 0.25  # nats, half precision against the same weights
_SHORT: Final = 1024  # tokens of the longest row without ``long``
_PROMPT: Final = 12  # tokens
_ANSWERS: Final = (6, 9, 2)  # tokens


def check_model(
    model: str | Path | Callable[[], Any],
    *,
    dtype: str = "float32",
    lora: Any = 8,
    long: bool = False,
    only: str | Sequence[str] | None = None,
    **options: Any,
) -> list[ModelRow]:
    """Check a model against its own forward, one sequence at a time.

    Args:
        model: folder or hub name, or a function that returns a transformers model, the same each time.
        dtype: that training would use.
        lora: rank or peft config of the rows on adapters.
        long: go beyond thresholds of more than 1,024 tokens too.
        only: names of rows beside that on loading; absent: all.
        options: of ``TorchBackend.from_pretrained``.

    Returns:
        A row for each check. If the model does not load, that row alone.

    Raises:
        ConfigError: a model of this kind has no row of a name in ``only``.
    """
    with tempfile.TemporaryDirectory() as folder:
        check = _Check(model, dtype, lora, long, {"checkpoint_dir": folder, **options})
        rows = [row("loads", check.loads)]
        if rows[0].verdict == "right":
            every = check.all()
            names = _names(only, every)
            for name in names:
                _require_row(name, every)
            rows += [row(name, every[name]) for name in names]
    return rows


def _require_row(name: str, every: Collection[str]) -> None:
    if name not in every:
        known = "\n".join(f"  {each!r}" for each in every)  # one a line: there are commas in them
        raise ConfigError(f"there is no row {name!r}{suggestion(name, every)}; the rows of this model are:\n{known}")


def _names(only: str | Sequence[str] | None, every: Iterable[str]) -> list[str]:
    if only is None:
        return list(every)
    return [name for name in ([only] if isinstance(only, str) else only) if name != "loads"]


@final
class _Check:
    """The rows on one model: it is loaded once as it is, once with an adapter, and once more to resume."""

    def __init__(self, model: Any, dtype: str, lora: Any, long: bool, options: dict[str, Any]) -> None:
        self._model, self._dtype, self._lora, self._long, self._options = model, dtype, lora, long, options
        self._own: dict[int, list[Tensor]] = {}

    def loads(self) -> Found:
        return "right", None, "; ".join(self._plain.model.facts.reasons)

    def all(self) -> dict[str, Callable[[], Found]]:
        """The other rows, by name."""
        found: dict[str, Callable[[], Found]] = {}
        for prompt, words in self._prompts().items():
            for layout in ("single", "packed", "forked", "padded"):
                found[f"log-probs, {layout}{words}"] = partial(self._logprobs, layout, prompt)
        found["beyond the context"] = self._beyond_context
        if self._dtype != "float32":
            found[f"log-probs in {self._dtype}"] = self._in_dtype
        found["gradient, full"] = self._full_gradient
        found["sampling"] = self._sampling
        found["gradient, LoRA"] = lambda: self._gradient(self._adapted)
        found["log-probs, adapter moved"] = self._adapter
        found["reference"] = self._reference
        found["what is trained"] = lambda: trained_share(self._adapted.model)
        found["checkpoint and resume"] = self._resume
        return found

    @cached_property
    def _plain(self) -> Any:
        """The model without an adapter; one that is quantised has one, which changes nothing yet."""
        try:
            return self._make(lora=None)
        except UnsupportedError:
            adapted = self._make(lora=self._lora)
            if not self._quantized(adapted):
                raise
            return adapted

    @staticmethod
    def _quantized(backend: Any) -> bool:
        return is_quantized(backend.model.causal)

    @cached_property
    def _adapted(self) -> Any:
        return self._make(lora=self._lora)

    def _make(self, **changes: Any) -> TorchBackend:
        options = {"dtype": "float32", "device": None, **self._options, **changes}
        if not callable(self._model):
            return TorchBackend.from_pretrained(self._model, **options)
        from ...backends.native.models.lora import add_lora

        model, lora = self._model(), options.pop("lora")
        device, dtype = options.pop("device"), getattr(torch, options.pop("dtype"))
        model = model.to(device) if is_quantized(model) else model.to(device, dtype)
        if lora is None:
            require_adapter(model)
        return TorchBackend(HFModel(add_lora(model, lora) if lora else model), **options)

    def _prompts(self) -> dict[int, str]:
        """Tokens of the prompts, and what their rows are called: one beyond each threshold, or else one that is long."""
        facts: ModelFacts = self._plain.model.facts
        found = {_PROMPT: "", **{n + max(3, n // 4): f", beyond {n} tokens" for n in facts.thresholds}}
        most = min(_SHORT, facts.max_length or _SHORT)
        if max(found) < most // 2:
            found[most - max(_ANSWERS)] = f", {most:,} tokens"
        return found

    def _data(self, prompt: int = _PROMPT) -> list[Datum]:
        """Texts that share a prompt, and one that does not."""
        generator = torch.Generator().manual_seed(0)

        def draw(n: int) -> list[int]:
            return torch.randint(self._plain.vocab_size, (n,), generator=generator).tolist()

        shared, short = draw(prompt), draw(5)
        answers = _ANSWERS if prompt < _SHORT // 2 else _ANSWERS[:2]  # a long text takes seconds
        return [
            datum_from_prompt_completion(short, draw(3)),
            *(datum_from_prompt_completion(shared, draw(n)) for n in answers),
        ]

    def _logprobs(self, layout: Any, prompt: int) -> Found:
        if prompt > _SHORT and not self._long:
            return "not applicable", None, "longer than 1,024 tokens; ask for it with long"
        data = self._data(prompt)
        layouts = self._plain.layouts(max(len(datum.model_input) for datum in data))
        if layout not in layouts:
            reason = self._plain._native.scheduler.layouts.reasons.get(layout, "not for this length")
            words = f"not used, texts go {', '.join(layouts)}: {reason}. Likely cause: {CAUSES[layout]}"
            return "refused", None, words
        if prompt not in self._own:
            self._own[prompt] = own_logprobs_of(self._plain.model, data)
        with using_layout(self._plain, layout):
            return verdict_on(largest_difference(scored(self._plain, data), self._own[prompt]), _TOLERANCE, layout)

    def _beyond_context(self) -> Found:
        most = self._plain.model.facts.max_length
        if most is None:
            return "not applicable", None, "the config names no context"
        limit = self._plain._native.limits.max_length
        if most > _SHORT and not self._long and (limit is None or limit > most):
            return "not applicable", float(most), "longer than 1,024 tokens; ask for it with long"
        try:
            self._plain.forward([datum_from_prompt_completion([3] * most, [4, 5])]).result()
        except InvalidDatumsError:
            return "right", float(most), "a text beyond the context is refused"
        return "wrong", float(most), f"a text beyond the context of {most} tokens is scored, and nothing is said"

    def _in_dtype(self) -> Found:
        lora = self._lora if self._quantized(self._plain) else None
        backend, data = self._make(dtype=self._dtype, lora=lora), self._data()
        return verdict_on(
            largest_difference(scored(backend, data), own_logprobs_of(backend.model, data)), _HALF, "dtype"
        )

    def _full_gradient(self) -> Found:
        if self._quantized(self._plain):
            return "not applicable", None, "the weights are quantized"
        return self._gradient(self._plain)

    def _gradient(self, backend: Any) -> Found:
        data = self._data()
        with perturbed_adapters(backend.model):
            backend.forward_backward_custom(data, _loss).result()
            found = backend.gradients()
            backend.discard_gradients()
            with torch.enable_grad():
                _loss(data, [own_logprobs(backend.model, datum) for datum in data])[0].backward()
            expected = {n: p.grad for n, p in backend.model.named_parameters() if p.grad is not None}
        backend.model.zero_grad()
        off = sum((found[n].double() - x.double()).square().sum() for n, x in expected.items())
        size = sum(x.double().square().sum() for x in expected.values())
        return verdict_on(float(off / size) ** 0.5, 1e-4, "gradient")

    def _adapter(self) -> Found:
        data = self._data()
        with perturbed_adapters(self._adapted.model):
            return verdict_on(
                largest_difference(scored(self._adapted, data), own_logprobs_of(self._adapted.model, data)),
                _TOLERANCE,
                "adapter",
            )

    def _reference(self) -> Found:
        data = self._data()
        with perturbed_adapters(self._adapted.model):
            scored = with_reference(data, self._adapted.reference())
        found = [d.loss_fn_inputs["ref_logprobs"].to_torch() for d in scored]
        return verdict_on(largest_difference(found, own_logprobs_of(self._plain.model, data)), _TOLERANCE, "reference")

    def _sampling(self) -> Found:
        prompts = [ModelInput.from_ints(d.model_input.tokens[: 4 + 3 * i]) for i, d in enumerate(self._data()[1:])]
        rollouts = self._plain.sample(prompts, 2, SamplingParams(max_tokens=8, seed=0, stop=[])).result()
        wholes = [
            datum_from_prompt_completion(prompts[one.prompt_index].tokens.tolist(), one.tokens) for one in rollouts
        ]
        own = [
            x[-len(one.tokens) :] for one, x in zip(rollouts, own_logprobs_of(self._plain.model, wholes), strict=True)
        ]
        how = "with a cache" if cache_agrees(self._plain.model) else "without a cache, at quadratic cost"
        verdict, figure, cause = verdict_on(
            largest_difference([torch.tensor(one.logprobs) for one in rollouts], own), 1e-3, "sampling"
        )
        return verdict, figure, f"{how}: {cause}" if cause else how

    def _resume(self) -> Found:
        first, data = self._adapted, self._data()
        start = scored(first, data)
        first.forward_backward(data, "cross_entropy").result()
        first.optim_step(AdamParams(learning_rate=1e-2)).result()
        second = self._make(lora=self._lora)
        second.load_state_with_optimizer(first.save_state("checked").result().path).result()
        after = scored(first, data)
        if not largest_difference(after, start) > 0:
            return "wrong", 0.0, "a step changes nothing"
        return verdict_on(largest_difference(scored(second, data), after), 1e-6, "resume")


def _loss(_: Any, logprobs: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
    return torch.stack([(x.exp() * x).sum() for x in logprobs]).sum(), {}
