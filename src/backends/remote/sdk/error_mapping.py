"""What an SDK's error means for the user: whose mistake it is, and whether anything may have happened at the service."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from ....errors import PullbackError, RemoteError

__all__ = ["at_service", "final_answer", "remote_error"]

_FOREIGN: Final = ("tinker.", "fireworks.", "httpx.")
# The SDKs add variables of their own to what the service said; only the support of a service could use the id.
_SDK_VARIABLES: Final = re.compile(
    r"\s+for self\.request_id='[^']*'( and expected type self\.model_cls=.*)?", re.DOTALL
)
_REFUSED: Final = {
    400: "the request is not valid there",
    401: "it does not know this API key",
    402: "the account has no credit",
    403: "this API key may not do that",
    404: "it does not have what was asked for",
    409: "what is there is in the way",
    413: "the request is too large",
    422: "the request is not valid there",
    429: "it has too much to do; try again later",
}


def remote_error(error: Exception, operation: str) -> Exception:
    """Return an error of waiting for a service as ours, naming the operation."""
    if isinstance(error, PullbackError):
        return error
    what = f"{type(error).__name__}: {_SDK_VARIABLES.sub('', str(error))}"
    category, status = _category(error), getattr(error, "status_code", None)
    if hasattr(error, "category"):  # a final answer: the operation has failed
        words = f"{operation} failed at the service: {what}"
    elif isinstance(status, int) and status in _REFUSED:
        words = f"{operation} was refused by the service, {_REFUSED[status]}: {what}"
    else:
        words = f"{operation} got no final answer from the service, so it may have taken effect or not: {what}"
    found = RemoteError(words, category)
    found.__cause__ = error
    return found


def final_answer(error: BaseException) -> bool:
    """Whether an error says that the service has done nothing of a request."""
    return isinstance(error, RemoteError) and error.category != "unknown"


@contextmanager
def at_service(operation: str) -> Iterator[None]:
    """Give errors of the SDK our form; errors of this process stay what they are.

    Raises:
        RemoteError: for whatever comes from the SDK.
    """
    try:
        yield
    except Exception as error:
        if not f"{type(error).__module__}.".startswith(_FOREIGN):
            raise
        raise remote_error(error, operation) from error


def _category(error: Any) -> str:
    own = str(getattr(getattr(error, "category", None), "value", getattr(error, "category", "")))
    if own in ("user", "server"):
        return own
    return "user" if getattr(error, "status_code", None) in _REFUSED else "unknown"
