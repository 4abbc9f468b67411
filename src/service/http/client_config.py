"""What the official SDK is told before it connects."""

from __future__ import annotations

from typing import Any, Final

__all__ = ["client_config"]

# So that it never cuts a pair into two requests.
_CLIENT: Final = {
    "fwdbwd_max_chunk_len": 100_000,
    "fwdbwd_max_chunk_bytes_count": 200_000_000,
    "custom_loss_server_side": True,
}


def client_config(python: str) -> dict[str, Any]:
    """Return the SDK's settings.

    Args:
        python: version that the client runs on, as it says.

    The SDK's default transport, pyqwest, waits by ``asyncio.wait_for``, which in Python 3.11 loses a cancellation that comes
    together with the answer. A client that closes while its heartbeat is answered would then wait for that heartbeat's end
    for ever, so such a client is given httpx's own transport.
    """
    return {**_CLIENT, "use_pyqwest_transport": not python.startswith("3.11.")}
