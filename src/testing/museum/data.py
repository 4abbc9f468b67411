"""Defects of training data: which tokens are there, which are trained, and where a text ends."""

from __future__ import annotations

from typing import Any, Final

from ...datums.builders import datum_from_prompt_completion, datum_from_tokens_weights
from ...datums.types import Datum, ModelInput
from .exhibit import Exhibit

__all__ = ["DATA"]


def _chat(messages: Any, tokenizer: Any) -> tuple[list[int], int]:
    """Return the tokens of a chat, and how many of them come before the last answer."""
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    return ids, len(tokenizer(prompt, add_special_tokens=False)["input_ids"])


def _last_answer(messages: Any, tokenizer: Any) -> Datum:
    ids, prompt = _chat(messages, tokenizer)
    return datum_from_prompt_completion(ids[:prompt], ids[prompt:])


def _shifted_twice(messages: Any, tokenizer: Any) -> Datum:
    ids, prompt = _chat(messages, tokenizer)
    ids, labels = ids[:-1], ids[1:]
    weights = [float(j + 1 >= prompt) for j in range(len(labels))]
    return Datum(ModelInput.from_ints(ids[:-1]), {"target_tokens": labels[1:], "weights": weights[1:]})


def _shifted_once(messages: Any, tokenizer: Any) -> Datum:
    ids, prompt = _chat(messages, tokenizer)
    ids, labels = ids[:-1], ids[1:]
    weights = [float(j + 1 >= prompt) for j in range(len(labels))]
    return Datum(ModelInput.from_ints(ids), {"target_tokens": labels, "weights": weights})


def _doubled_bos(messages: Any, tokenizer: Any) -> dict[str, Any]:
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(text)["input_ids"]
    _, prompt = _chat(messages, tokenizer)
    return {"input_ids": ids, "loss_mask": [int(j > prompt) for j in range(len(ids))]}


def _one_bos(messages: Any, tokenizer: Any) -> dict[str, Any]:
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    _, prompt = _chat(messages, tokenizer)
    return {"input_ids": ids, "loss_mask": [int(j >= prompt) for j in range(len(ids))]}


def _doubled_end(messages: Any, tokenizer: Any) -> Datum:
    ids, prompt = _chat(messages, tokenizer)
    if ids[-1] != tokenizer.eos_token_id:  # it is a newline
        ids = [*ids, tokenizer.eos_token_id]
    return datum_from_prompt_completion(ids[:prompt], ids[prompt:])


def _end_is_padding(messages: Any, tokenizer: Any) -> dict[str, Any]:
    ids, prompt = _chat(messages, tokenizer)
    pad_token_id = tokenizer.eos_token_id
    labels = [-100 if j < prompt or t == pad_token_id else t for j, t in enumerate(ids)]
    return {"input_ids": ids, "labels": labels}


def _padding_of_its_own(messages: Any, tokenizer: Any) -> dict[str, Any]:
    ids, prompt = _chat(messages, tokenizer)
    pad_token_id = tokenizer.pad_token_id
    labels = [-100 if j < prompt or t == pad_token_id else t for j, t in enumerate(ids)]
    return {"input_ids": ids, "labels": labels}


def _header_trained(messages: Any, tokenizer: Any) -> Datum:
    ids, _ = _chat(messages, tokenizer)
    text = tokenizer.apply_chat_template(messages[:-1], tokenize=False)
    prompt = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    return datum_from_prompt_completion(ids[:prompt], ids[prompt:])


def _header_in_prompt(messages: Any, tokenizer: Any) -> Datum:
    ids, _ = _chat(messages, tokenizer)
    text = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    prompt = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    return datum_from_prompt_completion(ids[:prompt], ids[prompt:])


def _all_ones(messages: Any, tokenizer: Any) -> dict[str, Any]:
    ids, _ = _chat(messages, tokenizer)
    return {"input_ids": ids, "assistant_masks": [1] * len(ids)}


def _answer_only(messages: Any, tokenizer: Any) -> dict[str, Any]:
    ids, prompt = _chat(messages, tokenizer)
    return {"input_ids": ids, "assistant_masks": [0] * prompt + [1] * (len(ids) - prompt)}


def _mask_of_inputs(messages: Any, tokenizer: Any) -> Datum:
    ids, prompt = _chat(messages, tokenizer)
    mask = [float(j >= prompt) for j in range(len(ids))]
    return Datum(ModelInput.from_ints(ids[:-1]), {"target_tokens": ids[1:], "weights": mask[:-1]})


def _mask_of_targets(messages: Any, tokenizer: Any) -> Datum:
    ids, prompt = _chat(messages, tokenizer)
    mask = [float(j >= prompt) for j in range(len(ids))]
    return Datum(ModelInput.from_ints(ids[:-1]), {"target_tokens": ids[1:], "weights": mask[1:]})


def _cut_and_ended(messages: Any, tokenizer: Any, max_length: int = 1024) -> Datum:
    ids, prompt = _chat(messages, tokenizer)
    ids = ids[: max_length + 1]
    ids[-1] = tokenizer.eos_token_id  # "so that the end is not cut off"
    return datum_from_tokens_weights(ids, [float(j >= prompt) for j in range(len(ids))])


def _cut(messages: Any, tokenizer: Any, max_length: int = 1024) -> Datum:
    ids, prompt = _chat(messages, tokenizer)
    ids = ids[: max_length + 1]
    return datum_from_tokens_weights(ids, [float(j >= prompt) for j in range(len(ids))])


def _labels_as_weights(messages: Any, tokenizer: Any) -> Datum:
    ids, prompt = _chat(messages, tokenizer)
    return datum_from_tokens_weights(ids, [-100.0 if j < prompt else 1.0 for j in range(len(ids))])


def _zero_is_untrained(messages: Any, tokenizer: Any) -> Datum:
    ids, prompt = _chat(messages, tokenizer)
    return datum_from_tokens_weights(ids, [0.0 if j < prompt else 1.0 for j in range(len(ids))])


_KIND: Final = "data"

DATA = (
    Exhibit(
        "shifted twice",
        "GanjinZero/RRHF#49 (2023), allenai/open-instruct#1549 (2026)",
        "The collator shifted the labels and the model shifted them again: it learnt to predict the token after the next one.",
        _shifted_twice,
        _shifted_once,
        "shift",
        "shifted twice",
        _KIND,
    ),
    Exhibit(
        "BOS token doubled",
        "huggingface/open-r1#462 (2025), huggingface/alignment-handbook#127 (2024)",
        "Every text began with two beginning-of-text tokens, which at sampling time it did not: prompts that the model had "
        "never seen.",
        _doubled_bos,
        _one_bos,
        "tokens",
        "there twice",
        _KIND,
    ),
    Exhibit(
        "EOS token doubled",
        "huggingface/trl#3318 (2025)",
        "The template ends with a newline after its end token, so a second end token was appended and trained: after stopping, "
        "say newline and stop.",
        _doubled_end,
        _last_answer,
        "tokens",
        "an end token is added",
        _KIND,
    ),
    Exhibit(
        "EOS token masked as padding",
        "huggingface/trl#1623 (2024)",
        "With pad_token = eos_token the collator masked the real end too, and fine-tuned models did not stop generating.",
        _end_is_padding,
        _padding_of_its_own,
        "end",
        "masked as padding",
        _KIND,
    ),
    Exhibit(
        "header trained",
        "huggingface/trl#4201 (2025)",
        "The prompt was rendered without its generation prompt, so the template's own header was trained as if the model had "
        "to write it.",
        _header_trained,
        _header_in_prompt,
        "header",
        "add_generation_prompt=True",
        _KIND,
    ),
    Exhibit(
        "mask of ones",
        "NVIDIA-NeMo/Megatron-Bridge#3927 (2026)",
        "For a template without generation marks the assistant mask came back as all ones, and silently: system, user and tool "
        "texts were trained.",
        _all_ones,
        _answer_only,
        "prompt",
        "all ones",
        _KIND,
    ),
    Exhibit(
        "mask of the inputs",
        "verl-project/verl#3287 (2025)",
        "A mask of the inputs was used for the targets: the first token of every answer was not trained.",
        _mask_of_inputs,
        _mask_of_targets,
        "answer",
        "differ by one place",
        _KIND,
    ),
    Exhibit(
        "cut, and called finished",
        "huggingface/transformers#19742 (2022), OpenRLHF's datasets",
        "Truncated texts have their last token overwritten by the end token: a model learns to stop in mid-sentence, the more "
        "often the shorter the limit.",
        _cut_and_ended,
        _cut,
        "truncation",
        "mid-sentence",
        _KIND,
    ),
    Exhibit(
        "-100 as a weight",
        "converters from labels to weights",
        "The label that means 'ignored' becomes a factor: the prompt is unlearnt a hundred times as strongly as the answer is "
        "learnt.",
        _labels_as_weights,
        _zero_is_untrained,
        "weights",
        "are used as weights",
        _KIND,
    ),
)
