"""Write a journal of version 2 with its checkpoints, and what it says, by the code of commit 23d5337.

    git worktree add ../v2 23d5337 && cp tests/golden/make_journal_v2.py ../v2 && cd ../v2
    PYTHONPATH=.alias:tests/support python make_journal_v2.py FOLDER

Written to the folder: ``served`` (the journal and the checkpoints) and ``said.json`` (the rows, as that code read them).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from servers import MODEL, Direct

TWO = f"tinker://{MODEL}/sampler_weights/two"
THREE = f"tinker://{MODEL}/sampler_weights/three"


def made(folder: Path) -> dict[str, Any]:
    """Use a service; return what its journal says afterwards."""
    direct = Direct(folder)
    direct.start()
    samplers, number = direct.operations.samplers, iter(range(1, 99))
    direct.read(direct.gradient(next(number)))
    for name, session, given in (("two", 1, {"model_path": TWO}), ("three", 2, {"model_path": THREE})):
        direct.read(direct.call("save_for_sampler", next(number), path=name))
        samplers.create(f"sess:sample:{session}", "me", given)
    samplers.create("sess:sample:0", "me", {"base_model": "tiny"})
    direct.read(direct.call("save_for_sampler", next(number), sampling_session_seq_id=3))
    direct.read(direct.call("optim_step", next(number)))
    direct.read(direct.call("save_for_sampler", next(number), path="three", overwrite=True, ttl_seconds=10**8))
    direct.read(direct.call("save_weights", next(number), path="lost", user_metadata={"b": "c"}))
    direct.journal.accept("req-open", "me", MODEL, next(number), "digest", "optim_step")
    said = {
        "sessions": direct.journal.sessions("me"),
        "models": direct.journal.models("me"),
        "samplers": [direct.journal.sampler(f"sess:sample:{i}") for i in range(4)],
        "checkpoints": direct.journal.checkpoints("me"),
        "written": direct.journal.database.meta("written"),
    }
    direct.sequencer.close()
    direct.journal.close()
    return said


if __name__ == "__main__":
    place = Path(sys.argv[1])
    rows = made(place / "served")
    (place / "said.json").write_text(json.dumps(rows, indent=1) + "\n")
