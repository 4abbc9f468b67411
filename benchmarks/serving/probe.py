"""Asks a service for ``healthz`` until its input ends, then prints the seconds of each answer.

It is a process of its own, so that what it measures is the service and not the threads of the clients.
"""

from __future__ import annotations

import http.client
import json
import select
import sys
import time
from urllib.parse import urlsplit

_PAUSE = 0.01  # seconds between two questions


def main(url: str, key: str) -> None:
    """Ask, on one connection."""
    place, latencies = urlsplit(url), []
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=600)
    print("asking", flush=True)
    while not select.select([sys.stdin], [], [], _PAUSE)[0]:
        began = time.perf_counter()
        connection.request("GET", "/api/v1/healthz", headers={"x-api-key": key})
        connection.getresponse().read()
        latencies.append(time.perf_counter() - began)
    print(json.dumps(latencies))


if __name__ == "__main__":
    main(*sys.argv[1:])
