"""What a client is told of an operation that it asked for: the result, a failure, or to ask again."""

from __future__ import annotations

import asyncio
from typing import Any, Final, final

from ..durability.answers import Answer, Failure
from ..limits import Limits
from ..operations import Operations
from ..queueing.sequencer import Sequencer
from ..wire.json_form import json_result
from .polling import LongPolls
from .requests import Call, json_response

__all__ = ["PROTOBUF", "Results"]

PROTOBUF: Final = "application/x-protobuf"


@final
class Results:
    """Answers ``retrieve_future``.

    Args:
        operations: of the service.
        sequencer: has the futures.
        limits: how long a request waits, and what is a large result.

    Attributes:
        polls: the requests that wait.
    """

    def __init__(self, operations: Operations, sequencer: Sequencer, limits: Limits) -> None:
        self._operations, self._sequencer, self._limits = operations, sequencer, limits
        self.polls = LongPolls()

    async def retrieve(self, call: Call) -> Any:
        """Wait for a result; where it is large, a client that can is told its size first."""
        await call.load()
        request_id = call.body["request_id"]
        future = await asyncio.to_thread(self._sequencer.result, call.owner, request_id)
        answer = await self.polls.answer(call.request, request_id, future, self._limits.poll_seconds)
        if answer is None:
            return json_response({"type": "try_again", "request_id": request_id, "queue_state": "active"}, 408)
        size = len(answer) if isinstance(answer, bytes) else 0
        if size > self._limits.large_bytes and call.body.get("allow_metadata_only") is True:
            return json_response({"status": "complete_metadata", "response_payload_size": size})
        self._operations.training.delivered(request_id)
        return await self._written(call, request_id, answer)

    async def _written(self, call: Call, request_id: str, answer: Answer) -> Any:
        from starlette.responses import Response

        if isinstance(answer, Failure):
            return json_response({"error": answer.text, "category": answer.category})
        if isinstance(answer, dict):
            return json_response(self._operations.names.shown(answer) if call.forked else answer)
        accepts = call.request.headers.get("accept", "*/*")
        if PROTOBUF in accepts or "*/*" in accepts:
            return Response(answer, media_type=PROTOBUF)
        operation = await asyncio.to_thread(self._operations.journal.operation, request_id)
        return json_response(json_result(operation.kind if operation else "", answer))
