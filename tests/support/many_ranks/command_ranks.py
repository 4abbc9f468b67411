"""One process of a command line that torchrun would start in several."""

from __future__ import annotations

import sys

from pullback.cli import main

if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
