"""The table of all causal language models in transformers: right in every layout that is used, or refused in words.

``python -m pullback.testing.models.zoo_table`` prints it.
"""

from __future__ import annotations

import argparse
import datetime
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final, Literal, final

import torch
from torch import Tensor

from ...backends.native.backend import TorchBackend
from ...backends.native.models.facts.rope import reset_dynamic_rope
from ...backends.native.models.hf import HFModel
from ...datums.builders import datum_from_prompt_completion
from ...datums.types import Datum
from ...errors import PullbackError
from ..modelcheck.layouts import using_layout
from . import zoo

__all__ = ["PROMPTS", "VARIANTS", "WINDOW", "ZooRow", "examine", "markdown"]

WINDOW: Final = 8
PROMPTS: Final = (WINDOW, 3 * WINDOW, 40 * WINDOW)
_TOLERANCE: Final = 1e-5  # nats; relative, for gradients; both fp32
_SECONDS: Final = 240

_ORIGINAL: Final[Mapping[str, Any]] = {"original_max_position_embeddings": 2 * WINDOW}
_FACTORS: Final[Mapping[str, Any]] = {
    **{"rope_type": "longrope", "rope_theta": 1e4, "factor": 32.0, **_ORIGINAL},
    **{"short_factor": [1.0, 1.1, 1.2, 1.5], "long_factor": [1.0, 3.0, 9.0, 27.0]},
}
_LONGROPE: Final[Mapping[str, Any]] = {"rope_parameters": _FACTORS, **_ORIGINAL}
_DYNAMIC: Final[Mapping[str, Any]] = {
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 16.0},
    "max_position_embeddings": 4 * WINDOW,
}
# Beside the defaults of an architecture: rotary frequencies that depend on the length.
VARIANTS: Final[Mapping[str, tuple[str, Mapping[str, Any]]]] = {
    **{f"{name}, longrope": (name, _LONGROPE) for name in ("llama", "mistral", "phi3", "qwen3")},
    "phimoe, longrope": (
        "phimoe",
        {"rope_parameters": {**_FACTORS, "short_mscale": 1.0, "long_mscale": 1.2}, **_ORIGINAL},
    ),
    **{f"{name}, dynamic NTK": (name, _DYNAMIC) for name in ("llama", "mistral", "olmo2", "qwen3")},
}

Verdict = Literal["right", "refused", "wrong", "not built"]


@final
@dataclass(frozen=True)
class ZooRow:
    """What was found of one architecture.

    Attributes:
        name: ``model_type``, with the variant.
        verdict: ``right``, ``refused`` in words, ``wrong``, or ``not built`` where there is no tiny model.
        layouts: those used for texts of each length in ``PROMPTS``.
        nats: largest difference of a log-prob from the model's own.
        gradient: largest relative difference of the gradient from autograd through the model's own forward.
        reason: why, in words.
    """

    name: str
    verdict: Verdict
    layouts: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    nats: float | None = None
    gradient: float | None = None
    reason: str = ""


def examine(name: str, prompts: Sequence[int] = PROMPTS) -> ZooRow:
    """Compare a tiny model in every layout that is used with its own forward, one text at a time.

    Args:
        name: a ``model_type``, or one of ``VARIANTS``.
        prompts: lengths of the shared prompts, tokens.
    """
    model_type, changes = VARIANTS.get(name, (name, {}))
    try:
        model, plain = (zoo.build(model_type, window=WINDOW, **changes) for _ in range(2))
    except Exception as error:
        return ZooRow(name, "not built", reason=_words(error))
    try:
        wrapped = HFModel(model)
        first = TorchBackend(wrapped)
    except PullbackError as error:
        return ZooRow(name, "refused", reason=_words(error))
    except Exception as error:
        return ZooRow(name, "wrong", reason=f"loading raises {_words(error)}")
    return _compared(name, first, plain.eval(), prompts)


def _compared(name: str, first: TorchBackend, plain: Any, prompts: Sequence[int]) -> ZooRow:
    texts = {n: sharing_prompt(n, (4, WINDOW + 3, 2)) for n in prompts}
    layouts = {n: first.layouts(max(len(d.model_input) for d in data)) for n, data in texts.items()}
    nats, gradient, reasons = 0.0, 0.0, []
    for n, data in texts.items():
        own, slopes = _own(plain, data)
        for layout in layouts[n]:
            try:
                with using_layout(first, layout):
                    off, slope = _off(first, data, own), _slope_off(first, data, slopes)
            except Exception as error:
                reasons.append(f"{layout}, prompt of {n} tokens: {_words(error)}")
                continue
            nats, gradient = max(nats, off), max(gradient, slope)
            if not (off <= _TOLERANCE and slope <= _TOLERANCE):
                reasons.append(f"{layout}, prompt of {n} tokens: {off:.1e} nats, gradient {slope:.1e}")
    return ZooRow(name, "wrong" if reasons else "right", layouts, nats, gradient, "; ".join(reasons))


def sharing_prompt(length: int, answers: Sequence[int], seed: int = 0) -> list[Datum]:
    """Return datums whose prompt is shared."""
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(3, 60, (length,), generator=generator).tolist()
    drawn = [torch.randint(3, 60, (n,), generator=generator).tolist() for n in answers]
    return [datum_from_prompt_completion(prompt, tokens) for tokens in drawn]


def _loss(_: Any, logprobs: Sequence[Tensor]) -> tuple[Tensor, dict[str, float]]:
    return torch.stack([(x.exp() * x).sum() - x.sum() for x in logprobs]).sum(), {}


def _own(plain: Any, data: Sequence[Datum]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Log-probs that the model itself gives, one text at a time, and the gradient by autograd."""
    plain.zero_grad()
    own = []
    for datum in data:
        reset_dynamic_rope(plain)
        logits = plain(input_ids=datum.model_input.tokens[None], use_cache=False).logits[0].log_softmax(-1)
        own.append(logits.gather(-1, datum.loss_fn_inputs["target_tokens"].to_torch()[:, None])[:, 0])
    _loss(data, own)[0].backward()
    slopes = {f"model.{n}": p.grad.clone() for n, p in plain.named_parameters() if p.grad is not None}
    return [x.detach() for x in own], slopes


def _off(backend: TorchBackend, data: Sequence[Datum], own: Sequence[Tensor]) -> float:
    outputs = backend.forward(data).result().loss_fn_outputs
    pairs = zip(outputs, own, strict=True)
    return max(_nan_is_infinite((o["logprobs"].to_torch() - x).abs().max()) for o, x in pairs)


def _slope_off(backend: TorchBackend, data: Sequence[Datum], slopes: Mapping[str, Tensor]) -> float:
    backend.forward_backward_custom(data, _loss).result()
    found = backend.gradients()
    backend.discard_gradients()
    zero = torch.zeros(())
    names = slopes.keys() | found.keys()
    off = sum((found.get(n, zero).double() - slopes.get(n, zero).double()).square().sum() for n in names)
    size = sum(x.double().square().sum() for x in slopes.values())
    return _nan_is_infinite((torch.as_tensor(off) / size).sqrt())


def _nan_is_infinite(value: Tensor) -> float:
    return float(value.nan_to_num(nan=float("inf")))


def _words(error: BaseException) -> str:
    first = next(iter(str(error).strip().splitlines()), "")
    return first if isinstance(error, PullbackError) else f"{type(error).__name__}: {first}"


@contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} s of computing")

    before = signal.signal(signal.SIGVTALRM, stop)  # not the clock's: others may be at work
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _in_time(name: str) -> ZooRow:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        with _at_most(_SECONDS):
            return examine(name)
    except Exception as error:  # a comparison that stops is a finding too
        return ZooRow(name, "wrong", reason=_words(error))


def _layouts(row: ZooRow) -> str:
    whole = list(row.layouts.items())
    longest = whole[-1][1] if whole else ()
    short = [
        f"{', '.join(x for x in found if x not in longest)} up to {n}"
        for n, found in whole
        if set(found) - set(longest)
    ]
    return ", ".join(longest) + (f" ({short[-1]} tokens)" if short else "")


def _list(numbers: Sequence[int]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} or {numbers[-1]}"


def markdown(rows: Sequence[ZooRow]) -> str:
    """Return the table as a page."""
    counts = Counter(row.verdict for row in rows)
    versions = ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch"))
    lines = [
        "# Architectures",
        "",
        "Every causal language model of transformers, tiny and random, in fp32 on the CPU. Log-probs, and the gradient of a",
        "custom loss, are compared with the model's own forward and autograd, one text at a time, in every layout that `auto`",
        f"may choose: three texts share a prompt of {_list(PROMPTS)} tokens, windows are {WINDOW}. *Right* is within",
        f"{_TOLERANCE:g} nats, and {_TOLERANCE:g} of the gradient's norm; what is *refused* does not load, in these words.",
        "",
        f"{datetime.date.today()}, {versions}, `make zoo`: "
        + ", ".join(f"{counts[verdict]} {verdict}" for verdict in ("right", "refused", "wrong", "not built"))
        + f", of {len(rows)}.",
        "",
        "| model | verdict | layouts | log-probs, nats | gradient | why |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        figures = ["" if x is None else f"{x:.0e}" for x in (row.nats, row.gradient)]
        reason = row.reason.replace("|", "\\|")
        lines.append(f"| {row.name} | {row.verdict} | {_layouts(row)} | {' | '.join(figures)} | {reason} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; status 1 if a row is wrong."""
    parser = argparse.ArgumentParser(prog="python -m pullback.testing.models.zoo_table", description=__doc__)
    parser.add_argument("names", nargs="*", help="default: every architecture and variant")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--write", type=Path, help="write the page to this file too")
    given = parser.parse_args(arguments)
    names = given.names or [*zoo.model_types(), *VARIANTS]
    rows = []
    with ProcessPoolExecutor(given.workers, mp_context=get_context("spawn")) as pool:
        for row in pool.map(_in_time, names):
            rows.append(row)
            print(f"{row.name:28} {row.verdict:9} {_layouts(row)} {row.reason}", file=sys.stderr, flush=True)
    page = markdown(sorted(rows, key=lambda row: row.name))
    if given.write:
        given.write.write_text(page)
    print(page)
    return int(any(row.verdict == "wrong" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
