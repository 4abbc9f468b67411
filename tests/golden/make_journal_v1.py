"""Write a journal of version 1 with its checkpoints, and what it says, by the code of commit 5ccafee.

    git worktree add ../v1 5ccafee && cp tests/golden/make_journal_v1.py ../v1 && cd ../v1
    PYTHONPATH=.alias:tests/support python make_journal_v1.py FOLDER

Written to the folder: ``served`` (the journal and the checkpoints) and ``said.json`` (the rows, as that code read them).
"""

from __future__ import annotations

import base64
import json
import sys
import time
from pathlib import Path
from typing import Any

from servers import MODEL, Direct

from pullback.service.durability.journal import Failure

LEFT = {"thrown": "req-thrown", "open": "req-open"}


def made(folder: Path) -> dict[str, Any]:
    """Use a service; return what its journal says afterwards."""
    direct = Direct(folder)
    direct.journal.accept("req-thrown", "me", "gone", 1, "digest", "forward")
    direct.journal.finish("req-thrown", {"type": "old"})
    direct.journal.forget_answers(time.time())
    direct.start()
    direct.journal.add_session("theirs", "another", {"a": 1})
    direct.journal.add_sampler("sess:sample:0", "me", None, durable=True)
    asked = {
        "forward_backward": direct.gradient(1),
        "failed": direct.gradient(2, "dpo", ("ref_logprobs",)),
    }
    for request in asked.values():
        direct.read(request)
    asked["optim_step"] = direct.call("optim_step", 3)
    asked["save_weights"] = direct.call("save_weights", 4, path="one", user_metadata={"b": "c"})
    asked["save_weights_for_sampler"] = direct.call("save_for_sampler", 5, path="two")
    for request in asked.values():
        direct.read(request)
    direct.journal.accept("req-open", "me", MODEL, 6, "digest", "optim_step")
    said = {
        "sessions": direct.journal.sessions("me") + direct.journal.sessions("another"),
        "models": direct.journal.models("me"),
        "sampler": direct.journal.sampler("sess:sample:0"),
        "checkpoints": direct.journal.checkpoints("me"),
        "operations": {name: _operation(direct, request) for name, request in {**asked, **LEFT}.items()},
    }
    direct.sequencer.close()
    direct.journal.close()
    return said


def _operation(direct: Direct, request: str) -> dict[str, Any]:
    operation = direct.journal.operation(request)
    assert operation is not None
    answer: Any = operation.answer
    if isinstance(answer, bytes):
        answer = {"protobuf": base64.b64encode(answer).decode()}
    if isinstance(answer, Failure):
        answer = {"failure": [answer.text, answer.category]}
    fields = ("request", "owner", "queue", "number", "digest", "kind", "expired")
    return {**{name: getattr(operation, name) for name in fields}, "answer": answer}


if __name__ == "__main__":
    place = Path(sys.argv[1])
    rows = made(place / "served")
    (place / "said.json").write_text(json.dumps(rows, indent=1) + "\n")
