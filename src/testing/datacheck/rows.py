"""What every builder of training examples has: the rows of `check_builder`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

from ...datums.prefix import common_prefix
from ...errors import ConfigError, PullbackError
from .example import BuiltExample, built_example
from .regions import Regions

__all__ = ["BUILDER_ROWS", "Built", "Messages", "call_of"]

Messages = Sequence[Mapping[str, str]]
_TOKENIZER: Final = ("tokenizer", "processing_class", "processor")
_ROW: Final = ("example", "row", "sample", "record")


@final
@dataclass(frozen=True)
class Built:
    """What a builder made of one chat.

    Attributes:
        build: the builder.
        tokenizer: what it tokenizes with.
        messages: the chat.
        example: what it returned.
        regions: what each of its tokens is.
    """

    build: Callable[..., Any]
    tokenizer: Any
    messages: Messages
    example: BuiltExample
    regions: Regions


def call_of(build: Callable[..., Any], tokenizer: Any, messages: Messages, **options: Any) -> Callable[[], Any]:
    """Return the call of a builder, each argument by its name."""
    called: dict[str, Any] = dict(options)
    needed = []
    for name, parameter in inspect.signature(build).parameters.items():
        if name in _TOKENIZER:
            called[name] = tokenizer
        elif parameter.default is parameter.empty and parameter.kind in (
            parameter.POSITIONAL_ONLY,
            parameter.POSITIONAL_OR_KEYWORD,
        ):
            needed.append(name)
    if len(needed) != 1:
        raise ConfigError(
            f"a builder takes one argument beside {', '.join(_TOKENIZER)}: the messages; this one needs {needed or 'none'}; "
            "give what is its own by functools.partial"
        )
    called[needed[0]] = {"messages": list(messages)} if needed[0] in _ROW else list(messages)
    return lambda: build(**called)


def _shift(built: Built) -> str | None:
    """A target is the token that follows its input."""
    inputs, targets = built.example.inputs, built.example.targets

    def agrees(by: int) -> bool:
        pairs = [(t, j + by) for j, t in enumerate(targets) if t is not None and j + by < len(inputs)]
        return all(t == inputs[k] for t, k in pairs)

    if agrees(1):
        return None
    if agrees(2):
        return (
            "a target is the token after the next one. Likely cause: labels are shifted twice, in the builder and again where "
            "they are used"
        )
    if agrees(0):
        return "a target is the token that goes in. Likely cause: nothing was shifted"
    return "a target is not the next token. Likely cause: tokens and labels come from two different renderings"


def _tokens(built: Built) -> str | None:
    """The tokens are those of the template's own text, each of them once."""
    text = built.tokenizer.apply_chat_template(list(built.messages), tokenize=False)
    own = [int(t) for t in built.tokenizer(text, add_special_tokens=False)["input_ids"]]
    found = list(built.example.tokens)
    if found == own or (own[: len(found)] == found and not built.tokenizer.decode(own[len(found) :]).strip()):
        return None
    bos = getattr(built.tokenizer, "bos_token_id", None)
    if bos is not None and found[:2] == [bos, bos]:
        return (
            "the token that begins a text is there twice. Likely cause: the template writes it, and the tokenizer adds it once "
            "more; tokenize with add_special_tokens=False"
        )
    if found[: len(own)] == own:
        extra = built.tokenizer.decode(found[len(own) :])
        return (
            f"{extra!r} is appended to what the template writes. Likely cause: an end token is added to a text that has one, "
            "because the last token is a newline"
        )
    k = common_prefix(found, own)
    shown = built.tokenizer.decode(found[k : k + 1]), built.tokenizer.decode(own[k : k + 1])
    return (
        f"token {k} is {shown[0]!r}, where the template's own text has {shown[1]!r}. Likely cause: prompt and answer are "
        "tokenized apart, or not by the template"
    )


def _weights(built: Built) -> str | None:
    """Weights are numbers, none of them below 0."""
    for j, w in enumerate(built.example.weights):
        if not math.isfinite(w) or w < 0:
            cause = (
                "labels, whose -100 means 'ignored', are used as weights"
                if w == -100
                else "no mask, but something else"
            )
            return f"token {j} has the weight {w:g}, which would be unlearnt. Likely cause: {cause}"
    return None


def _prompt(built: Built) -> str | None:
    """Nothing that the user or the system said is trained."""
    regions, trained = built.regions, built.example.trained
    wrong = [j for j in regions.prompt if trained[j]]
    if not wrong:
        return None
    cause = "everything is trained: the mask is all ones" if all(trained[1:]) else "the mask begins too early"
    return f"token {wrong[0]} {regions.shown(wrong[0])}, of what the user or the system said, is trained. Likely cause: {cause}"


def _header(built: Built) -> str | None:
    """What the template writes before an answer is not trained."""
    regions, trained = built.regions, built.example.trained
    wrong = [j for j in regions.headers if trained[j]]
    if not wrong:
        return None
    found = f"token {wrong[0]} {regions.shown(wrong[0])}, which the template writes before an answer, is trained"
    if _prompt(built) is not None:
        return f"{found}: see prompt"
    return (
        f"{found}. Likely cause: the prompt is rendered without add_generation_prompt=True, so its length leaves "
        "out the header"
    )


def _answer(built: Built) -> str | None:
    """Every token of an answer is trained, the first and the last too."""
    regions, trained = built.regions, built.example.trained
    for number, tokens in enumerate(regions.answers):
        last = number == len(regions.answers) - 1
        left = [j for j in tokens if not trained[j]]
        if not tokens:
            return f"answer {number} is not among the tokens. Likely cause: the chat is cut, or rendered without it"
        if left and (last or len(left) < len(tokens)):
            where = {tokens[0]: "first", tokens[-1]: "last"}.get(left[0], "")
            cause = (
                "weights of the inputs are used for the targets, or the other way round: they differ by one place"
                if len(left) == 1 and where
                else "the span of the answer is found in the wrong place"
            )
            token = f"the {where or 'inner'} token {left[0]} {regions.shown(left[0])}"
            return f"{token} of an answer is not trained. Likely cause: {cause}"
    return None


def _end(built: Built) -> str | None:
    """The token that ends an answer is trained."""
    regions, trained = built.regions, built.example.trained
    for tokens, end in zip(regions.answers, regions.ends, strict=True):
        if not any(trained[j] for j in tokens):
            continue
        if end is None:
            return "nothing follows the answer. Likely cause: the end token is cut off: a model never learns to stop"
        if not trained[end]:
            return (
                f"the token {end} {regions.shown(end)} that ends an answer is not trained, so a model never learns to stop. "
                "Likely cause: the padding token is the end token and is masked as padding, or the mask ends with the words"
            )
    return None


def _truncation(built: Built) -> str | None:
    """A text that is cut off is not trained as if it had ended."""
    if "max_length" not in inspect.signature(built.build).parameters or not built.regions.answers[-1]:
        return None
    end, answer = built.regions.ends[-1], built.regions.answers[-1]
    length = answer[len(answer) // 2]
    try:
        returned = call_of(built.build, built.tokenizer, built.messages, max_length=length)()
        cut = None if returned is None else built_example(returned)
    except (PullbackError, ValueError):
        return None  # refused: nothing is trained
    if cut is None or end is None:
        return None
    if len(cut.inputs) > length:
        return f"with max_length={length} it has {len(cut.inputs)} tokens. Likely cause: the length is not looked at"
    if cut.tokens[-1] == built.example.tokens[end] and cut.trained[-1]:
        return (
            f"cut at {length} tokens, in the middle of an answer, it ends with {built.regions.shown(end)}, trained. Likely "
            "cause: the last token is overwritten by the end token, so that a model learns to stop in mid-sentence"
        )
    return None


BUILDER_ROWS: Final[dict[str, Callable[[Built], str | None]]] = {
    "shift": _shift,
    "tokens": _tokens,
    "weights": _weights,
    "prompt": _prompt,
    "header": _header,
    "answer": _answer,
    "end": _end,
    "truncation": _truncation,
}
