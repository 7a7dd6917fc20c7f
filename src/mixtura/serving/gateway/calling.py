"""One call to an upstream: sent, read whole or frame by frame, and what went wrong by its kind."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, final

import aiohttp

from mixtura.errors import MixturaError, UserError
from mixtura.running.composing.upstreams import outcome_of
from mixtura.serving.gateway.config import Upstream
from mixtura.types.asking import Outcome

_MOST_BODY: Final = 64 << 20
_MOST_FRAME: Final = 4 << 20
# Of an upstream's words to an error of the user's, what is handed on.
_MOST_WORDS: Final = 500
_MOST_AFTER_S: Final = 3600.0


class CallError(MixturaError):
    """A call that was not answered.

    Attributes:
        outcome: its kind.
        after_s: when the upstream wants to be asked again.
        words: of the upstream, where it refused the request itself.
        is_free: whether the upstream said so itself, so that nothing was read or written for it.
    """

    def __init__(
        self, outcome: Outcome, after_s: float | None = None, words: str = "", *, is_free: bool = False
    ) -> None:
        super().__init__(outcome)
        self.outcome = outcome
        self.after_s = after_s
        self.words = words
        self.is_free = is_free


@final
@dataclass(frozen=True, slots=True)
class Frame:
    """An event of a stream.

    Attributes:
        raw: as it came, to be handed on.
        data: what it says; None for the last, which says that it is the last.
    """

    raw: str
    data: dict[str, Any] | None

    @property
    def choices(self) -> list[dict[str, Any]]:
        """Parts of answers in it."""
        found = (self.data or {}).get("choices")
        return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []

    @property
    def has_content(self) -> bool:
        """Whether it has something of an answer, and not its role alone."""
        for choice in self.choices:
            if choice.get("text") or choice.get("finish_reason"):
                return True
            delta = choice.get("delta")
            if isinstance(delta, dict) and any(value for key, value in delta.items() if key != "role"):
                return True
        return False


@final
class Caller:
    """Sends calls to upstreams; connections are kept.

    Args:
        upstreams: by name.

    Raises:
        UserError: the key of one is not in the environment.
    """

    def __init__(self, upstreams: Mapping[str, Upstream]) -> None:
        self._upstreams = upstreams
        self._headers = {name: _headers(name, one) for name, one in upstreams.items()}
        self._session: aiohttp.ClientSession | None = None

    async def whole(self, upstream: str, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a call.

        Raises:
            CallError: there is none.
        """
        async with _told_apart(), self._sent(upstream, path, body) as response:
            await _check(response)
            try:
                found = json.loads(await _read(response))
            except ValueError:
                raise CallError("broken") from None
        _check_answer(found)
        return found  # type: ignore[no-any-return]

    async def frames(self, upstream: str, path: str, body: Mapping[str, Any]) -> AsyncGenerator[Frame, None]:
        """The answer to a call as it comes; it ends with the frame that says so, or it is broken.

        Raises:
            CallError: there is none, or it ends early.
        """
        async with _told_apart(), self._sent(upstream, path, body) as response:
            await _check(response)
            if not response.headers.get("Content-Type", "").startswith("text/event-stream"):
                raise CallError("broken")
            open_choices: set[int] = set()
            has_finished = False
            async for raw, text in _events(response.content):
                frame = _frame(raw, text)
                for choice in frame.choices:
                    number = choice.get("index", 0)
                    if choice.get("finish_reason"):
                        open_choices.discard(number)
                        has_finished = True
                    else:
                        open_choices.add(number)
                if frame.data is None:
                    break
                yield frame
            # An answer that no frame called finished is cut off, whatever comes behind it.
            if open_choices or not has_finished:
                raise CallError("broken")
            yield Frame("data: [DONE]\n\n", None)

    async def close(self) -> None:
        """Let go of all connections."""
        if self._session is not None:
            await self._session.close()

    def _sent(self, name: str, path: str, body: Mapping[str, Any]) -> Any:
        if self._session is None:
            # Made here, as it belongs to the loop that runs now. Limits of upstreams are ours to keep.
            connector = aiohttp.TCPConnector(limit=0, ttl_dns_cache=60)
            self._session = aiohttp.ClientSession(connector=connector, auto_decompress=True)
        one = self._upstreams[name]
        timeout = aiohttp.ClientTimeout(
            total=None, connect=one.connect_s, sock_connect=one.connect_s, sock_read=one.stall_s
        )
        return self._session.post(
            f"{one.address.rstrip('/')}/{path}", data=json.dumps(body).encode(), headers=self._headers[name],
            timeout=timeout, allow_redirects=False,
        )  # fmt: skip


@final
class _told_apart:  # noqa: N801
    """Turns what a connection may raise into the kind of outcome that it is."""

    async def __aenter__(self) -> None:
        return None

    async def __aexit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
            raise CallError("down", is_free=True) from None
        if isinstance(error, TimeoutError | aiohttp.ServerTimeoutError):
            raise CallError("timeout") from None
        if isinstance(error, aiohttp.ClientError | OSError | ValueError):
            raise CallError("broken") from None


def _headers(name: str, upstream: Upstream) -> dict[str, str]:
    headers = {"Content-Type": "application/json"}
    if upstream.key:
        secret = os.environ.get(upstream.key, "").strip()
        if not secret:
            raise UserError(
                f"the upstream {name} wants its key in the environment variable {upstream.key}; set it"
            )
        if not (secret.isascii() and secret.isprintable()):
            raise UserError(
                f"the environment variable {upstream.key} holds no key: it is not one line of ASCII"
            )
        headers["Authorization"] = f"Bearer {secret}"
    return headers


async def _check(response: aiohttp.ClientResponse) -> None:
    """Refuse a response that is no answer by its status."""
    if response.status == 200:
        return
    outcome = outcome_of(response.status)
    words = ""
    if outcome == "refused":
        # What is wrong with keys and accounts is nothing for whoever asks; what is wrong with the request is.
        try:
            words = str(json.loads(await _read(response))["error"]["message"])[:_MOST_WORDS]
        except (ValueError, KeyError, TypeError, CallError):
            words = ""
    raise CallError(outcome, _after(response.headers.get("Retry-After")), words, is_free=True)


def _after(header: str | None) -> float | None:
    """Seconds that a Retry-After asks for; dates are not read.

    >>> _after("3"), _after("soon"), _after(None)
    (3.0, None, None)
    """
    try:
        found = float(header or "")
    except ValueError:
        return None
    return min(found, _MOST_AFTER_S) if found >= 0 else None


async def _read(response: aiohttp.ClientResponse) -> bytes:
    parts, size = [], 0
    async for part in response.content.iter_any():
        size += len(part)
        if size > _MOST_BODY:
            raise CallError("broken")
        parts.append(part)
    return b"".join(parts)


def _check_answer(found: Any) -> None:
    """Refuse what has the status of an answer and is none."""
    choices = found.get("choices") if isinstance(found, dict) else None
    if not isinstance(choices, list) or not choices or found.get("error"):
        raise CallError("broken")
    for choice in choices:
        is_one = isinstance(choice, dict) and (
            isinstance(choice.get("message"), dict) or isinstance(choice.get("text"), str)
        )
        if not is_one or choice.get("finish_reason") in (None, "error"):
            raise CallError("broken")


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[tuple[str, str]]:
    """Events of a stream, each as it came and what its data is; comments alone are left out."""
    waiting = b""
    async for part in content.iter_any():
        waiting += part.replace(b"\r\n", b"\n") if b"\r" in part else part
        if b"\r\n" in waiting:
            waiting = waiting.replace(b"\r\n", b"\n")
        while b"\n\n" in waiting:
            event, _, waiting = waiting.partition(b"\n\n")
            text = event.decode("utf-8", "replace").lstrip("\n")
            lines = [line[5:].removeprefix(" ") for line in text.split("\n") if line.startswith("data:")]
            if lines:
                yield text + "\n\n", "\n".join(lines)
        if len(waiting) > _MOST_FRAME:
            raise CallError("broken")


def _frame(raw: str, text: str) -> Frame:
    if text.strip() == "[DONE]":
        return Frame(raw, None)
    try:
        found = json.loads(text)
    except ValueError:
        raise CallError("broken") from None
    if not isinstance(found, dict) or found.get("error"):
        raise CallError("broken")
    return Frame(raw, found)
