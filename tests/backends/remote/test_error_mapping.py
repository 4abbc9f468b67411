"""What the SDK raises becomes an error of ours, in words; errors of this process stay what they are."""

from __future__ import annotations

import inspect
from typing import Any

import httpx
import pytest
import tinker
from servers import SDK_WARNINGS
from tinker import _exceptions
from tinker.lib.retryable_exception import RetryableException

from pullback.backends.remote.sdk.error_mapping import at_service, remote_error
from pullback.errors import (
    ConfigError,
    RemoteError,
)

pytestmark = SDK_WARNINGS
REQUEST = httpx.Request("POST", "http://127.0.0.1/api/v1/forward_backward")


def _sdk_errors() -> list[type[Exception]]:
    """Every exception class of the SDK's module of them, and the one that lies elsewhere."""
    found = [c for _, c in inspect.getmembers(_exceptions, inspect.isclass) if issubclass(c, Exception)]
    return [
        *(c for c in found if c.__module__.startswith("tinker") and not c.__name__.startswith("_")),
        RetryableException,
    ]


def _made(kind: type[Any]) -> Any:
    if issubclass(kind, tinker.RequestFailedError):
        return kind("bad datum", "req-1", tinker.types.RequestErrorCategory.User)
    if issubclass(kind, tinker.APIStatusError):
        status = getattr(kind, "status_code", None)
        status = status if isinstance(status, int) else 500
        return kind("said so", response=httpx.Response(status, request=REQUEST), body=None)
    if issubclass(kind, tinker.APIResponseValidationError):
        return kind(httpx.Response(200, request=REQUEST), None)
    if issubclass(kind, tinker.APIConnectionError):
        return kind(request=REQUEST)
    if issubclass(kind, tinker.APIError):
        return kind("went wrong", REQUEST, body=None)
    return kind(message="gone") if issubclass(kind, RetryableException) else kind("went wrong")


MISTAKES = {
    "RequestFailedError",
    "BadRequestError",
    "AuthenticationError",
    "BillingError",
    "PermissionDeniedError",
    "NotFoundError",
    "ConflictError",
    "UnprocessableEntityError",
    "RateLimitError",
}


@pytest.mark.parametrize("kind", _sdk_errors(), ids=lambda kind: kind.__name__)
def test_every_error_of_the_sdk_becomes_ours(kind: type[Exception]) -> None:
    """RemoteError, with the operation, the SDK's words, the cause, and whether it may have had an effect."""
    error: Exception = _made(kind)
    found = remote_error(error, "optim_step")
    assert isinstance(found, RemoteError)
    assert found.__cause__ is error
    assert "optim_step" in str(found)
    assert kind.__name__ in str(found)
    assert found.category == ("user" if kind.__name__ in MISTAKES else "unknown")
    with pytest.raises(RemoteError), at_service("optim_step"):
        raise error


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("no room for self.request_id='req-1' and expected type self.model_cls=<class 'tinker.types.Out'>", "no room"),
        ("no room for self.request_id='req-1' and expected type self.model_cls=A | B", "no room"),
        ("no room for self.request_id='req-1' (3 retries)", "no room (3 retries)"),
        ("no room for request_id='req-1' and 9 models", "no room for request_id='req-1' and 9 models"),
    ],
)
def test_variables_of_the_sdk_are_left_out(said: str, told: str) -> None:
    """What the service said is kept whole; what the SDK adds of its own variables is not told."""
    error = tinker.RequestFailedError(said, "req-1", tinker.types.RequestErrorCategory.User)
    found = remote_error(error, "forward")
    assert str(found) == f"forward failed at the service: RequestFailedError: {told}"


def test_errors_of_this_process_stay_what_they_are() -> None:
    """Nothing of ours, and nothing of the user's, is called the service's."""
    for error in (KeyError("mine"), ConfigError("ours")):
        with pytest.raises(type(error)) as caught, at_service("forward"):
            raise error
        assert caught.value is error
