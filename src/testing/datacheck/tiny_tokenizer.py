"""A tokenizer of characters with a ChatML template: for checks that need one and no download."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Final, final

__all__ = ["TinyTokenizer"]

_SPECIAL: Final = ("<s>", "<|im_start|>", "<|im_end|>", "<pad>")
_PIECES: Final = re.compile("|".join(map(re.escape, _SPECIAL)) + "|.", re.S)


@final
class TinyTokenizer:
    """Every character is a token, and every special token one. As for Llama 3, template and tokenizer both write ``<s>``.

    A character's id is its code point after the special tokens, so `vocab_size` holds what is ASCII.
    """

    bos_token_id: ClassVar[int] = 0
    eos_token_id: ClassVar[int] = 2
    pad_token_id: ClassVar[int] = 3
    all_special_tokens: ClassVar[tuple[str, ...]] = _SPECIAL
    vocab_size: ClassVar[int] = len(_SPECIAL) + 128

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """Return the ``input_ids`` of a text; with special tokens ``<s>`` comes first, whatever the text begins with."""
        ids = [_SPECIAL.index(p) if p in _SPECIAL else len(_SPECIAL) + ord(p) for p in _PIECES.findall(text)]
        return {"input_ids": [self.bos_token_id, *ids] if add_special_tokens else ids}

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of token ids, special ones included."""
        return "".join(_SPECIAL[t] if t < len(_SPECIAL) else chr(t - len(_SPECIAL)) for t in map(int, tokens))

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], tokenize: bool = False, add_generation_prompt: bool = False
    ) -> Any:
        """Return messages as text, or as token ids."""
        turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages]
        text = "".join(["<s>", *turns, "<|im_start|>assistant\n" if add_generation_prompt else ""])
        return self(text, add_special_tokens=False)["input_ids"] if tokenize else text
