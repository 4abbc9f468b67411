"""A service in a process of its own, for what greedy requests take: its memory is the kernel's account of that process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from servers import tiny_models

from pullback.service import serving

if __name__ == "__main__":
    with serving(tiny_models(Path(sys.argv[1])), keys=["tml-greedy", "tml-light"]) as url:
        print(url, os.getpid(), flush=True)
        sys.stdin.read()
