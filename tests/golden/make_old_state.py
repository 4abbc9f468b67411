"""Write a journal, checkpoints and what was computed from them, by the code of commit 56a7337.

Run with that commit's package in the path:  python tests/golden/make_old_state.py tests/golden/old_state

There, alpha was 2 x rank in this process and the rank at the service where a client named none (null in the journal), and an
adapter was on the head too. Written to the folder: ``base`` (the frozen model), ``served`` (the journal and the checkpoints of
a service), ``native`` (a checkpoint of a backend of rank 4), and ``expected.json`` (the log-probs of one datum).
"""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from pullback import AdamParams, Datum, ModelInput, TorchBackend
from pullback.testing import random_llama

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]
MODEL = "sess:train:0"


def module(name: str) -> Any:
    """A module as that commit names it."""
    return importlib.import_module(f"pullback.{name}")


def datum() -> Datum:
    """Eight tokens, each its own target."""
    return Datum(ModelInput.from_ints(TOKENS), {"target_tokens": TOKENS, "weights": [1.0] * len(TOKENS)})


def json_datum() -> dict[str, Any]:
    """The same, as it goes over the wire."""
    shape = [len(TOKENS)]
    target = {"data": TOKENS, "dtype": "int64", "shape": shape}
    weights = {"data": [1.0] * len(TOKENS), "dtype": "float32", "shape": shape}
    chunks = [{"type": "encoded_text", "tokens": TOKENS}]
    return {"model_input": {"chunks": chunks}, "loss_fn_inputs": {"target_tokens": target, "weights": weights}}


def logprobs(backend: TorchBackend) -> list[float]:
    """What the model says of the datum."""
    output = backend.forward([datum()], "cross_entropy").result()
    return [float(x) for x in output.loss_fn_outputs[0]["logprobs"].data]


def native(model: Any, folder: Path) -> list[float]:
    """Train two steps and save."""
    hf = module("backends.native.hf")
    torch.manual_seed(0)
    backend = TorchBackend(hf.HFModel(hf.add_lora(model, 4)), checkpoint_dir=folder)
    for _ in range(2):
        backend.forward_backward([datum()], "cross_entropy").result()
        backend.optim_step(AdamParams(learning_rate=0.1)).result()
    backend.save_state("native").result()
    return logprobs(backend)


def served(model: Any, folder: Path) -> list[float]:
    """Create a model of which a client says its rank alone, train two steps and save, twice."""
    service, journal = module("service"), module("service.journal").Journal(folder / "journal.sqlite")
    sequencer, limits = module("service.sequencer").Sequencer(journal), module("service.limits").Limits()
    tenants = service.Tenants(service.Base("tiny", model), folder)
    operations = module("service.operations").Operations(tenants, journal, sequencer, limits, lambda what, amount: None)

    def read(request: str) -> Any:
        answer = sequencer.result("", request).result()
        operations.training.delivered(request)
        return answer

    def call(part: Any, verb: str, given: dict[str, Any]) -> Any:
        return read(getattr(part, verb)("", json.dumps(given).encode(), given))

    journal.add_session("sess", "", None)
    asked = {"session_id": "sess", "model_seq_id": 0, "base_model": "tiny", "lora_config": {"rank": 2}}
    call(operations, "create_model", asked)
    decode = module("service.json_form").decode_json_request
    for step in range(2):
        inner = {"data": [json_datum()], "loss_fn": "cross_entropy"}
        given = {"model_id": MODEL, "seq_id": 2 * step + 1, "forward_backward_input": inner}
        read(operations.training.gradient("", decode(json.dumps(given).encode(), given, False, False)))
        adam = {"model_id": MODEL, "seq_id": 2 * step + 2, "adam_params": {"learning_rate": 0.1}}
        call(operations.training, "optim_step", adam)
    call(operations, "save_weights", {"model_id": MODEL, "seq_id": 5, "path": "old"})
    call(operations, "save_for_sampler", {"model_id": MODEL, "seq_id": 6, "path": "old"})
    found = logprobs(tenants.backends[MODEL])
    sequencer.close()
    journal.close()
    return found


def main(root: Path) -> None:
    """Write everything anew."""
    shutil.rmtree(root, ignore_errors=True)
    sizes = {"vocab_size": 16, "hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": 64}
    model: Any = random_llama(**sizes)
    model.save_pretrained(root / "base")
    base = type(model).from_pretrained(root / "base", dtype=torch.float32)
    expected = {"served": served(base, root / "served"), "native": native(model, root)}
    (root / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
