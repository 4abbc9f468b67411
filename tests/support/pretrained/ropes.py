"""Settings of models whose rotary embeddings change at a length, `CONTEXT`."""

from __future__ import annotations

from typing import Any

__all__ = ["CONTEXT", "LONGROPE", "ROPES"]

CONTEXT = 16
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": CONTEXT,
    "short_factor": [1.0, 1.5, 2.0, 3.0],
    "long_factor": [4.0, 8.0, 16.0, 16.0],
    "factor": 32.0,
}
ROPES: dict[str, Any] = {
    "phi3": {
        "rope_parameters": LONGROPE,
        "original_max_position_embeddings": CONTEXT,
        "sliding_window": None,
    },
    "llama": {
        "max_position_embeddings": CONTEXT,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 8.0},
    },
}
