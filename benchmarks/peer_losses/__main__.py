"""Check the losses of other projects, and write what is found as JSON and as a page.

python -m benchmarks.peer_losses --json benchmarks/peer_losses/found.json --page docs/peer-losses.md
python -m benchmarks.peer_losses --peers TRL verl     # print a few
"""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path

import torch

from .page import page
from .report import run
from .wrapped import PEERS


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peer_losses", description=__doc__)
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS), help="default: all")
    parser.add_argument("--json", type=Path, help="where to write what is found")
    parser.add_argument("--page", type=Path, help="where to write the page")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {"date": datetime.now(UTC).date().isoformat(), **run(arguments.peers)}
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    if arguments.page:
        arguments.page.write_text(page(found))
    if not (arguments.json or arguments.page):
        print(page(found))


if __name__ == "__main__":
    main()
