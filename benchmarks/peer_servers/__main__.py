"""``python -m benchmarks.peer_servers``: see the package."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from pathlib import Path

from .matrix import matrix, read_reports
from .model import write_model
from .peers import PEERS
from .run import check, install, isolated_command


def main(argv: list[str] | None = None) -> int:
    """Install, start and check the chosen servers; return how many could not be checked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peer_servers", description=__doc__)
    parser.add_argument("peers", nargs="*", metavar="peer", help=f"of {', '.join(PEERS)}; default: all")
    parser.add_argument("--folder", type=Path, default=Path("build/peers"), help="of environments, model and reports")
    parser.add_argument("--only", action="append", default=[], help="a check; may be given several times")
    parser.add_argument("--steps", default="check,diff", help="check: every promise; diff: against the native backend")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    unknown = sorted(set(arguments.peers) - set(PEERS))
    if unknown:
        parser.error(f"there is no {unknown[0]}, only {', '.join(PEERS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers end too
    folder: Path = arguments.folder.resolve()
    out = folder / "reports"
    out.mkdir(parents=True, exist_ok=True)
    model = folder / "model"
    if not model.is_dir():
        write_model(model)
    failed = [name for name in arguments.peers or PEERS if not _checked(name, arguments, folder, model, out)]
    if not arguments.inside:
        (out / "matrix.md").write_text(matrix(read_reports(out, [*PEERS])) + "\n")
    return len(failed)


def _checked(name: str, arguments: argparse.Namespace, folder: Path, model: Path, out: Path) -> bool:
    """Whether a report was written; a broken promise is one."""
    peer = PEERS[name]
    print(f"== {peer.name}, tinker {peer.sdk}: {peer.without}", flush=True)
    try:
        if not arguments.inside:
            install(peer, folder)
        if peer.isolated and not arguments.inside:
            given = [
                "--folder",
                str(folder),
                "--steps",
                arguments.steps,
                *(word for each in arguments.only for word in ("--only", each)),
            ]
            return subprocess.run(isolated_command(name, given), check=False).returncode == 0
        check(peer, folder, model, out, arguments.only, arguments.steps.split(","))
    except RuntimeError as error:
        print(f"{peer.name}: {error}", flush=True)
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
