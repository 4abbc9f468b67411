"""What is said to a service without an SDK: where there is none, an SDK goes on calling for minutes; and it unloads nothing."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

from ....errors import ConfigError, RemoteError, require_extra

__all__ = ["alive", "ask_capabilities", "unload"]

_PAUSES: Final = (0.1, 0.3, 1.0, 3.0)  # seconds
_TRY: Final = 5.0  # seconds for one try
_PATIENCE: Final = 10.0  # seconds for all tries together
_SHOWN: Final = 60  # characters of a foreign answer
_ROUTE: Final = "get_server_capabilities"
_LACKING: Final = (404, 405, 501)  # what a service says that does not have this route
_LATER: Final = (408, 429)
_MOST: Final = 1 << 20  # bytes that are read of an answer
_WANTED: Final = (
    "a service that speaks the Tinker training API answers with a JSON object that lists its supported_models; "
    "is this its address, with the port, and without /api/v1?"
)


def ask_capabilities(url: str, key: str, *, must_answer: bool = True) -> Mapping[str, Any] | None:
    """Return what a service says of itself; None if it speaks the protocol, or turns the key away, and says no more.

    Args:
        url, key: of the service.
        must_answer: silence, or a failure that may pass, is an error; otherwise nothing is said.

    Raises:
        ConfigError: the address is none.
        RemoteError: nobody answers at it, or something that is no service of this protocol.
    """
    _require_address(url)
    httpx = require_extra("httpx", "remote", "pullback.connect")
    with httpx.Client(base_url=f"{url.rstrip('/')}/api/v1", headers={"X-API-Key": key}, timeout=_TRY) as client:
        return _asked(client, url, must_answer)


def _asked(client: Any, url: str, must_answer: bool) -> Mapping[str, Any] | None:
    answer = _ask(client, url)
    if isinstance(answer, RemoteError):
        if must_answer:
            raise answer
        return None
    if answer.status_code in (401, 403):
        return None  # the SDK says so, at once and in its own words
    if answer.status_code in _LACKING and _speaks_plain_protocol(client):
        return None
    said = _json(answer)
    models = said.get("supported_models") if isinstance(said, dict) else None
    if answer.status_code != 200 or not isinstance(models, list) or not all(isinstance(m, dict) for m in models):
        raise RemoteError(f"{url} answered GET /api/v1/{_ROUTE} with {_described(answer)}; {_WANTED}", "user")
    return dict(said)


def alive(url: str, seconds: float) -> bool:
    """Whether anything answers at an address within ``seconds``, in whatever words."""
    httpx = require_extra("httpx", "remote", "pullback.connect")
    try:
        httpx.get(f"{url.rstrip('/')}/api/v1/healthz", timeout=seconds, verify=False)
    except (httpx.HTTPError, httpx.InvalidURL):
        return False
    return True


def unload(url: str, key: str, model: str) -> None:
    """Ask a service of ours to let go of a model that is used no more; if it does not, the end of the session does."""
    httpx = require_extra("httpx", "remote", "pullback.connect")
    body, headers = {"model_id": model, "type": "unload_model"}, {"X-API-Key": key}
    with suppress(httpx.HTTPError):
        httpx.post(f"{url.rstrip('/')}/api/v1/unload_model", json=body, headers=headers, timeout=_TRY)


def _require_address(url: str) -> None:
    httpx = require_extra("httpx", "remote", "pullback.connect")
    try:
        address = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ConfigError(f"{url!r} is no address of a service: {error}") from error
    if address.scheme not in ("http", "https") or not address.host:
        raise ConfigError(f"{url!r} is no address of a service: http://host:port or https://host was expected")


def _ask(client: Any, url: str) -> Any:
    """Return the answer, or why there is none; one that got lost is none: a service that can do more is no plain one."""
    httpx = require_extra("httpx", "remote", "pullback.connect")
    until, tries = time.monotonic() + _PATIENCE, 0
    for pause in (*_PAUSES, None):
        tries += 1
        left = until - time.monotonic()
        try:
            answer = _get(client, min(_TRY, max(0.1, left)))
        except httpx.ConnectError as error:
            raise RemoteError(_unconnected(url, error), "server") from error
        except httpx.TransportError as error:
            failure = f"{type(error).__name__}: {error}"
        else:
            if answer.status_code in _LACKING or (answer.status_code < 500 and answer.status_code not in _LATER):
                return answer
            failure = _described(answer)
        if pause is None or time.monotonic() + pause >= until:
            break
        time.sleep(pause)
    return RemoteError(
        f"{url} was asked {tries} times what it can do and did not answer as a service does ({failure}); if it is one, try "
        "again later, or give capabilities= to say it yourself; if not, check the address, the port, and http:// or https://",
        "server",
    )


def _get(client: Any, seconds: float) -> Any:
    """Ask once; of an answer without end the beginning is enough."""
    httpx = require_extra("httpx", "remote", "pullback.connect")
    until, body = time.monotonic() + seconds, bytearray()
    with client.stream("GET", _ROUTE, timeout=seconds) as answer:
        for part in answer.iter_bytes():
            body += part
            if len(body) > _MOST or time.monotonic() > until:
                break
        shown = {name: answer.headers[name] for name in ("content-type", "location") if name in answer.headers}
        return httpx.Response(answer.status_code, headers=shown, content=bytes(body))


def _speaks_plain_protocol(client: Any) -> bool:
    """Whether the SDK's first question is answered: services need not say what they can do."""
    httpx = require_extra("httpx", "remote", "pullback.connect")
    for method, route, body in (("POST", "client/config", {"sdk_version": "0"}), ("GET", "healthz", None)):
        try:
            answer = client.request(method, route, json=body)
        except httpx.HTTPError:
            continue
        if answer.status_code in (401, 403) or (answer.status_code == 200 and isinstance(_json(answer), dict)):
            return True
    return False


def _json(answer: Any) -> Any:
    try:
        return answer.json()
    except ValueError:  # no JSON, or no text
        return None


def _described(answer: Any) -> str:
    """Say in words what was answered: status, where it leads, kind, and how it begins."""
    to = f" to {answer.headers['location']}" if "location" in answer.headers else ""
    kind = answer.headers.get("content-type", "").partition(";")[0] or "no content type"
    begins = " ".join(answer.text.split())[:_SHOWN]
    return f"HTTP {answer.status_code}{to} ({kind}{f', {begins!r}' if begins else ''})"


def _unconnected(url: str, error: Exception) -> str:
    if "SSL" in str(error) or "CERTIFICATE" in str(error).upper():
        return f"no TLS connection to {url} ({error}); does the service speak plain http:// there, or has another certificate?"
    return f"no service answers at {url} ({error}); is it running, and is this its address?"
