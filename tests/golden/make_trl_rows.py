"""Record what TRL's trainers make of rows: the tokens, and which of them are trained.

Run in an environment of its own:  pip install torch==2.13.0, then pip install trl==1.16.0 transformers datasets
then:                              python tests/golden/make_trl_rows.py > tests/golden/trl_rows.json

``_prepare_dataset`` of the trainers is called as it is, on a stand-in for the trainer. The tokenizer and the chat templates are
those of ``tests/support``; where a template marks what is generated, its mark is TRL's own oracle of what is trained.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import tokenizers
import transformers
import trl
from datasets import Dataset
from pretrained.chat_templates import SHAPES
from pretrained.chat_tokenizer import chat_tokenizer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.sft_trainer import SFTTrainer


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def says(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


TEXTS = [{"text": "hello the sky"}, {"text": "Yes.</s>"}, {"text": "🙂 é\n\n"}]
COMPLETIONS = [
    {"prompt": "the sky is", "completion": " blue."},
    {"prompt": "ends in a space ", "completion": "the"},
    {"prompt": "a\n", "completion": "\nb</s>"},
]
TALKS = [[user("hi"), says("Yes")], [user("a 🙂"), says("Yes\n"), user(" b "), says("<think>\nhm\n</think>\n\nNo")]]
CHAT_COMPLETIONS = [{"prompt": talk[:-1], "completion": talk[-1:]} for talk in TALKS]
PAIRS = [
    {"prompt": "the sky is", "chosen": " blue.", "rejected": " green"},
    {"prompt": "b ", "chosen": "the", "rejected": "\n"},
]
IMPLICIT = [{"chosen": "the sky is blue", "rejected": "the sky is green"}, {"chosen": "a b Yes", "rejected": "a b No"}]
CHAT_PAIRS = [{"prompt": talk[:-1], "chosen": talk[-1:], "rejected": [says("the sky")]} for talk in TALKS]
IMPLICIT_CHATS = [{"chosen": r["prompt"] + r["chosen"], "rejected": r["prompt"] + r["rejected"]} for r in CHAT_PAIRS]
LABELLED = [{**row, "label": label} for row, label in zip(COMPLETIONS, (True, False, True), strict=True)]
CHAT_LABELLED = [{**row, "label": label} for row, label in zip(CHAT_COMPLETIONS, (False, True), strict=True)]


def prepared(trainer: Any, rows: list[dict[str, Any]], shape: str, **options: Any) -> list[dict[str, Any]]:
    """What a trainer's own preparation makes of rows."""
    tokenizer = chat_tokenizer(SHAPES[shape].template)
    stand_in = SimpleNamespace(
        _tokenizer=tokenizer,
        chat_template=None,
        completion_only_loss="completion" in rows[0],
        calculate_KL=False,
        desirable_weight=1.0,
        undesirable_weight=1.0,
    )
    arguments = SimpleNamespace(
        dataset_num_proc=None,
        dataset_text_field="text",
        max_length=None,
        truncation_mode="keep_start",
        shuffle_dataset=False,
        assistant_only_loss=options.pop("assistant_only_loss", False),
    )
    dataset = trainer._prepare_dataset(
        stand_in, Dataset.from_list(rows), tokenizer, arguments, **options, dataset_name="train"
    )
    return [dict(row) for row in dataset]


def sft(
    name: str, rows: list[dict[str, Any]], shape: str = "chatml", assistant_only_loss: bool = False
) -> dict[str, Any]:
    options = {"packing": False, "formatting_func": None, "assistant_only_loss": assistant_only_loss}
    made = prepared(SFTTrainer, rows, shape, **options)
    sides = [[{"ids": row["input_ids"], "trained": [label != -100 for label in row["labels"]]}] for row in made]
    return {"name": name, "by": "SFTTrainer", "shape": shape, "rows": rows, "sides": sides}


def pairs(name: str, rows: list[dict[str, Any]], shape: str = "chatml") -> dict[str, Any]:
    made = prepared(DPOTrainer, rows, shape)
    sides = [[joined(row["prompt_ids"], row[f"{side}_ids"]) for side in ("chosen", "rejected")] for row in made]
    return {"name": name, "by": "DPOTrainer", "shape": shape, "rows": rows, "sides": sides}


def labelled(name: str, rows: list[dict[str, Any]], shape: str = "chatml") -> dict[str, Any]:
    made = prepared(KTOTrainer, rows, shape)
    sides = [[joined(row["prompt_ids"], row["completion_ids"])] for row in made]
    labels = [bool(row["label"]) for row in made]
    return {"name": name, "by": "KTOTrainer", "shape": shape, "rows": rows, "sides": sides, "labels": labels}


def joined(prompt: list[int], answer: list[int]) -> dict[str, Any]:
    return {"ids": prompt + answer, "trained": [False] * len(prompt) + [True] * len(answer)}


def entries() -> list[dict[str, Any]]:
    made = [
        sft("text", TEXTS),
        sft("prompt and completion, text", COMPLETIONS),
        sft("messages", [{"messages": talk} for talk in TALKS], "chatml marked", assistant_only_loss=True),
        sft(
            "conversations, from and value",
            [{"conversations": [{"from": m["role"], "value": m["content"]} for m in talk]} for talk in TALKS],
            "chatml marked",
            assistant_only_loss=True,
        ),
        pairs("pairs, text", PAIRS),
        pairs("pairs, text, implicit prompt", IMPLICIT),
        labelled("labels, text", LABELLED),
    ]
    for shape in ("chatml", "llama3", "gemma", "mistral"):
        made.append(sft(f"prompt and completion, {shape}", CHAT_COMPLETIONS, shape))
        made.append(pairs(f"pairs, {shape}", CHAT_PAIRS, shape))
        made.append(pairs(f"pairs, {shape}, implicit prompt", IMPLICIT_CHATS, shape))
        made.append(labelled(f"labels, {shape}", CHAT_LABELLED, shape))
    return made


def main() -> None:
    versions = {"trl": trl.__version__, "transformers": transformers.__version__, "tokenizers": tokenizers.__version__}
    head = {"made_by": "tests/golden/make_trl_rows.py", "peer": "trl", "version": trl.__version__, "versions": versions}
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    body = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries())
    sys.stdout.write("{\n" + ",\n".join(lines) + ',\n"entries": [\n' + body + "\n]}\n")


if __name__ == "__main__":
    main()
