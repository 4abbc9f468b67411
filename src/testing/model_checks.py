"""Whether a model trains as itself: log-probs, gradients, adapters, reference, sampling, checkpoints against its own code."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, final

import torch
from torch import Tensor

from ..backends.native.backend import TorchBackend
from ..backends.native.models.facts import ModelFacts
from ..backends.native.models.hf import HFModel
from ..backends.native.models.probes import LayoutLimits
from ..backends.native.models.probing import perturbed_adapters
from ..backends.native.sampling import cache_agrees
from ..backends.reference import with_reference
from ..backends.types import AdamParams, SamplingParams
from ..datums.builders import datum_from_prompt_completion
from ..datums.types import Datum, ModelInput
from ..errors import InvalidDatumsError, PullbackError

__all__ = ["ModelRow", "check_model"]

Verdict = Literal["right", "refused", "wrong", "not applicable"]
_TOLERANCE: Final = 1e-4  # nats, fp32
_HALF: Final = 0.25  # nats, half precision against the same weights
_SHORT: Final = 1024  # tokens of the longest row without ``long``


@final
@dataclass(frozen=True)
class ModelRow:
    """One line of the table.

    Attributes:
        name: what was checked.
        verdict: ``right``, ``refused`` (in words), ``wrong``, or ``not applicable``.
        figure: largest difference or share found; None where there is none.
        reason: why, in words.
    """

    name: str
    verdict: Verdict
    figure: float | None = None
    reason: str = ""


def check_model(
    model: str | Path | Callable[[], Any], *, dtype: str = "float32", lora: Any = 8, long: bool = False, **options: Any
) -> list[ModelRow]:
    """Check a model against its own forward, one sequence at a time.

    Args:
        model: folder or hub name, or a function that returns a transformers model, the same each time.
        dtype: that training would use.
        lora: rank or peft config of the rows on adapters.
        long: go beyond thresholds of more than 1,024 tokens too.
        options: of ``TorchBackend.from_pretrained``.

    Returns:
        A row for each check. If the model does not load, that row alone.
    """
    check = _Check(model, dtype, lora, long, options)
    rows = list(check.loads())
    if rows[-1].verdict == "right":
        for name, one in check.all().items():
            rows.append(_row(name, one))
    return rows


Found = tuple[Verdict, float | None, str]


def _row(name: str, one: Callable[[], Found]) -> ModelRow:
    try:
        return ModelRow(name, *one())
    except PullbackError as error:
        return ModelRow(name, "refused", None, str(error))
    except Exception as error:  # whatever a model raises is a finding
        return ModelRow(name, "wrong", None, f"{type(error).__name__}: {error}")


@final
class _Check:
    def __init__(self, model: Any, dtype: str, lora: Any, long: bool, options: dict[str, Any]) -> None:
        self._model, self._dtype, self._lora, self._long, self._options = model, dtype, lora, long, options
        self._facts = ModelFacts()
        self._backend: Any = None

    def loads(self) -> Iterator[ModelRow]:
        def load() -> Found:
            self._backend = self._make(lora=None)
            self._facts = self._backend.model.facts
            return "right", None, "; ".join(self._facts.reasons)

        yield _row("loads", load)

    def all(self) -> dict[str, Callable[[], Found]]:
        found: dict[str, Callable[[], Found]] = {}
        for layout in ("single", "packed", "forked", "padded"):
            found[f"log-probs, {layout}"] = lambda layout=layout: self._logprobs(layout, None)  # type: ignore[misc]
            for n in self._facts.thresholds:
                name = f"log-probs, {layout}, beyond {n} tokens"
                found[name] = lambda layout=layout, n=n: self._logprobs(layout, n)  # type: ignore[misc]
        found["beyond the context"] = self._beyond_context
        if self._dtype != "float32":
            found[f"log-probs in {self._dtype}"] = self._in_dtype
        found["gradient, full"] = lambda: self._gradient(None)
        found["gradient, LoRA"] = lambda: self._gradient(self._lora)
        found["log-probs, adapter moved"] = self._adapter
        found["reference"] = self._reference
        found["sampling"] = self._sampling
        found["checkpoint and resume"] = self._resume
        found["what is trained"] = self._trained
        return found

    def _make(self, **changes: Any) -> TorchBackend:
        options = {"dtype": "float32", "lora": None, **self._options, **changes}
        if not callable(self._model):
            return TorchBackend.from_pretrained(self._model, **options)
        from ..backends.native.models.lora import add_lora

        model, lora, dtype = self._model(), options.pop("lora"), getattr(torch, options.pop("dtype"))
        return TorchBackend(HFModel(add_lora(model.to(dtype), lora) if lora else model.to(dtype)), **options)

    def _data(self, threshold: int | None) -> list[Datum]:
        """Texts with a shared prompt, and one of another length; on both sides of a length, where one is given."""
        vocab, generator = self._backend.vocab_size, torch.Generator().manual_seed(0)
        size = 12 if threshold is None else threshold + max(3, threshold // 4)

        def draw(n: int) -> list[int]:
            return torch.randint(vocab, (n,), generator=generator).tolist()

        prompt, short = draw(size), draw(5)
        return [
            datum_from_prompt_completion(p, draw(n)) for p, n in ((prompt, 6), (short, 3), (prompt, 9), (prompt, 2))
        ]

    def _logprobs(self, layout: Any, threshold: int | None) -> Found:
        if threshold is not None and threshold > _SHORT and not self._long:
            return "not applicable", None, "longer than 1,024 tokens; ask for it with long"
        data = self._data(threshold)
        layouts = self._backend.layouts(max(len(datum.model_input) for datum in data))
        if layout not in layouts:
            return "refused", None, f"not used; texts go {', '.join(layouts)}"
        with self._laid_out(layout):
            worst = _largest(self._backend, self._backend.model, data)
        return _judged(worst, _TOLERANCE)

    @contextmanager
    def _laid_out(self, layout: Any) -> Iterator[None]:
        engine = self._backend._native
        before = engine.scheduler
        engine.scheduler = replace(before, layouts=LayoutLimits({} if layout == "single" else {layout: None}))
        try:
            yield
        finally:
            engine.scheduler = before

    def _beyond_context(self) -> Found:
        most = self._facts.max_length
        if most is None:
            return "not applicable", None, "the config names no context"
        if most > _SHORT and not self._long:
            return "not applicable", float(most), "longer than 1,024 tokens; ask for it with long"
        try:
            self._backend.forward([datum_from_prompt_completion([3] * most, [4, 5])]).result()
        except InvalidDatumsError:
            return "right", float(most), "a text beyond the context is refused"
        return "wrong", float(most), f"a text beyond the context of {most} tokens is scored, and nothing is said"

    def _in_dtype(self) -> Found:
        backend = self._make(dtype=self._dtype)
        return _judged(_largest(backend, backend.model, self._data(None)), _HALF)

    def _gradient(self, lora: Any) -> Found:
        backend = self._make(lora=lora)
        with perturbed_adapters(backend.model):
            data = self._data(None)

            def loss(_: Any, logprobs: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
                return sum((x.exp() * x).sum() for x in logprobs), {}  # type: ignore[return-value]

            backend.forward_backward_custom(data, loss).result()
            found = backend.gradients()
            backend.model.zero_grad()
            own = [_own(backend.model, datum) for datum in data]
            loss(data, own)[0].backward()
            expected = {n: p.grad for n, p in backend.model.named_parameters() if p.grad is not None}
        names = sorted(expected)
        off = torch.stack([(found[n].double() - expected[n].double()).square().sum() for n in names]).sum().sqrt()
        size = torch.stack([expected[n].double().square().sum() for n in names]).sum().sqrt()
        return _judged(float(off / size), 1e-4)

    def _adapter(self) -> Found:
        backend = self._make(lora=self._lora)
        with perturbed_adapters(backend.model):
            return _judged(_largest(backend, backend.model, self._data(None)), _TOLERANCE)

    def _reference(self) -> Found:
        backend, data = self._make(lora=self._lora), self._data(None)
        with perturbed_adapters(backend.model):
            scored = with_reference(data, backend.reference())
        base = [_own(self._backend.model, datum) for datum in data]
        pairs = zip(scored, base, strict=True)
        return _judged(max(_gap(d.loss_fn_inputs["ref_logprobs"].to_torch(), x) for d, x in pairs), _TOLERANCE)

    def _sampling(self) -> Found:
        prompts = [ModelInput.from_ints(d.model_input.tokens[: 4 + 3 * i]) for i, d in enumerate(self._data(None)[:3])]
        rollouts = self._backend.sample(prompts, 2, SamplingParams(max_tokens=8, seed=0, stop=[])).result()
        worst = 0.0
        for one in rollouts:
            whole = datum_from_prompt_completion(prompts[one.prompt_index].tokens.tolist(), one.tokens)
            own = _own(self._backend.model, whole)[-len(one.tokens) :]
            worst = max(worst, _gap(torch.tensor(one.logprobs), own))
        how = "with a cache" if cache_agrees(self._backend.model) else "without a cache, at quadratic cost"
        verdict, figure, _ = _judged(worst, 1e-3)
        return verdict, figure, how

    def _resume(self) -> Found:
        with tempfile.TemporaryDirectory() as folder:
            first, second = (self._make(lora=self._lora, checkpoint_dir=folder) for _ in range(2))
            data = self._data(None)
            first.forward_backward(data, "cross_entropy").result()
            first.optim_step(AdamParams(learning_rate=1e-2)).result()
            second.load_state_with_optimizer(first.save_state("checked").result().path).result()
            pairs = zip(_scored(first, data), _scored(second, data), strict=True)
            return _judged(max(_gap(a, b) for a, b in pairs), 1e-6)

    def _trained(self) -> Found:
        backend = self._make(lora=self._lora)
        module: Any = backend.model.model
        left = sorted(
            {
                name.rsplit(".", 1)[-1]
                for name, one in module.named_modules()
                if isinstance(one, torch.nn.Linear) and not _below_adapter(name) and not hasattr(one, "lora_A")
            }
        )
        trained = sum(p.numel() for p in backend.model.parameters() if p.requires_grad)
        share = trained / sum(p.numel() for p in backend.model.parameters())
        experts = sorted(
            {n.rsplit(".", 1)[-1] for n, p in module.named_parameters() if p.dim() == 3 and "lora" not in n}
        )
        words = f"no adapter on: {', '.join([*left, *experts])}" if left or experts else "an adapter on every matrix"
        return "right", share, words


def _below_adapter(name: str) -> bool:
    return ".base_layer" in name or "lora_" in name


def _own(model: Any, datum: Datum) -> Tensor:
    """The log-probs that the transformers model itself gives, alone, [T]."""
    from ..backends.native.models.rope import reset_dynamic_rope

    reset_dynamic_rope(model)
    tokens = datum.model_input.tokens[None].to(model.device)
    logits = model.model(input_ids=tokens, use_cache=False).logits[0].float().log_softmax(-1)
    targets = datum.loss_fn_inputs["target_tokens"].to_torch().to(logits.device)
    found: Tensor = logits.gather(-1, targets[:, None])[:, 0]
    return found


def _scored(backend: Any, data: Sequence[Datum]) -> list[Tensor]:
    return [o["logprobs"].to_torch() for o in backend.forward(data).result().loss_fn_outputs]


@torch.no_grad()
def _largest(backend: Any, model: Any, data: Sequence[Datum]) -> float:
    return max(_gap(found, _own(model, datum)) for found, datum in zip(_scored(backend, data), data, strict=True))


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a.detach().cpu().double() - b.detach().cpu().double()).abs().max())


def _judged(figure: float, most: float) -> Found:
    return ("right" if figure <= most else "wrong"), figure, "" if figure <= most else f"more than {most:g}"
