"""Who may ask, and how much they may send: looked at before anything of a request is read."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any, Final, final

from mixtura.serving.addresses import is_loopback
from mixtura.serving.api.refusals import ApiError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# What anybody may ask: whether the server lives, and the page that asks for a key itself.
_OPEN: Final = {"/", "/health", "/ready"}


@final
class Guard:
    """Middleware: keys, the size of bodies, and pages of strangers that reach for a server of this machine.

    Args:
        app: what it guards.
        keys: any of which is needed; none for no keys.
        most_body_bytes: of a request.
        is_local: the server listens to this machine only, so requests that name another host are of a page
        that
            has made its name point here.
    """

    def __init__(self, app: App, keys: Collection[str], most_body_bytes: int, *, is_local: bool) -> None:
        self._app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._most = most_body_bytes
        self._is_local = is_local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        refused = self._refusal(scope["path"], headers)
        if refused is not None:
            await refused.response()(scope, receive, send)
            return
        counted = _Counted(receive, self._most)
        answered = False

        async def watched(message: MutableMapping[str, Any]) -> None:
            nonlocal answered
            if counted.is_over and not answered:
                return
            answered = True
            await send(message)

        await self._app(scope, counted, watched)
        if counted.is_over and not answered:
            await self._too_large().response()(scope, receive, send)

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> ApiError | None:
        if self._is_local and not is_loopback(_host(headers.get(b"host", b"localhost"))):
            return ApiError(
                "this server answers requests to localhost only; start it with --host for others", status=403
            )
        if self._digests and path not in _OPEN and not self._is_known(headers.get(b"authorization", b"")):
            return ApiError(
                "this server wants an API key: send the header 'Authorization: Bearer KEY'",
                status=401,
                code="invalid_api_key",
            )
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length[:20]) > self._most:
            return self._too_large()
        return None

    def _is_known(self, header: bytes) -> bool:
        kind, _, key = header.partition(b" ")
        given = hashlib.sha256(key.strip()).digest()
        # All of them, so that how long it takes says nothing.
        found = [hmac.compare_digest(given, digest) for digest in self._digests]
        return kind.lower() == b"bearer" and any(found)

    def _too_large(self) -> ApiError:
        return ApiError(f"the body is larger than the {self._most} bytes that this server takes", status=413)


@final
class _Counted:
    """Receives a body up to a size; of a larger one the rest is not read."""

    def __init__(self, receive: Receive, most: int) -> None:
        self._receive = receive
        self._left = most
        self.is_over = False

    async def __call__(self) -> MutableMapping[str, Any]:
        message = await self._receive()
        if message["type"] == "http.request":
            self._left -= len(message.get("body", b""))
            if self._left < 0:
                self.is_over = True
                return {"type": "http.disconnect"}
        return message


def _host(header: bytes) -> str:
    """A host's name without its port.

    >>> _host(b"localhost:8000"), _host(b"[::1]:80")
    ('localhost', '::1')
    """
    text = header.decode("latin-1").strip().lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0]
