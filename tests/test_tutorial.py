"""The tutorial from end to end: on a tiny model, and on a real one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pretrained.folders import chat_folder

from pullback.errors import MissingExtraError
from pullback.testing import smollm2_folder

PAGE = Path(__file__).parent.parent / "docs" / "tutorial.md"
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def follow(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the page's blocks, with this model in place of SmolLM2; return what they defined."""
    pytest.importorskip("peft", reason="the tutorial trains a LoRA adapter (extra hf)")
    monkeypatch.chdir(folder)
    monkeypatch.setattr("pullback.testing.smollm2_folder", lambda: model)
    defined: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S):
        exec(compile(block, str(PAGE), "exec"), defined)
    return defined


def scores(defined: dict[str, Any]) -> tuple[list[float], list[float]]:
    """The log-probs of the first datum, by the backend and by the adapter that transformers loaded."""
    datum = defined["data"][0]
    backend = defined["backend"].forward([datum]).result().loss_fn_outputs[0]["logprobs"].to_torch()
    tokens = torch.tensor([datum.model_input.to_ints()])
    with torch.no_grad():
        logprobs = defined["trained"](tokens).logits[0].double().log_softmax(-1)
    loaded = logprobs.gather(-1, datum.loss_fn_inputs["target_tokens"].to_torch()[:, None])[:, 0]
    return backend.tolist(), loaded.tolist()


def test_on_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block runs, the loss falls, and transformers scores with the adapter as the backend does."""
    model = chat_folder(tmp_path / "model")
    (model / "chat_template.jinja").write_text(_TEMPLATE)
    defined = follow(model, tmp_path, monkeypatch)
    ours, theirs = scores(defined)
    assert ours == pytest.approx(theirs, abs=1e-5)
    with defined["trained"].disable_adapter():
        assert scores(defined)[1] != pytest.approx(ours, abs=1e-3), "the adapter has learned something"


@pytest.mark.soak
@pytest.mark.smollm2
def test_on_a_real_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After six capitals the model answers for a seventh country, in the form that it was taught (and as it rounds)."""
    try:
        folder = smollm2_folder()
    except MissingExtraError as error:
        pytest.skip(str(error))
    defined = follow(folder, tmp_path, monkeypatch)
    assert re.match(r"<answer>\w+</answer>", defined["tokenizer"].decode(defined["answer"]))
