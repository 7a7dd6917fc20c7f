"""The server's process: its signals and its end."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, final

import uvicorn

from mixtura.serving.api.guarding import App


def serve_until_told(
    app: App,
    listening: socket.socket,
    grace_s: float,
    ready: Callable[[], None],
    at_end: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C; answers that are on their way have so many seconds to end.

    Args:
        app: what is served.
        listening: where.
        grace_s: seconds that answers have to end.
        ready: called when requests are taken.
        at_end: run in the server's own loop when no answer is on its way any more.
    """
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
        timeout_graceful_shutdown=max(int(grace_s), 1),
    )
    _Server(config, ready, at_end).run(sockets=[listening])


@final
class _Server(uvicorn.Server):
    """uvicorn's server, which ends the process as done when it was told to end."""

    def __init__(
        self,
        config: uvicorn.Config,
        ready: Callable[[], None],
        at_end: Callable[[], Awaitable[None]] | None,
    ) -> None:
        super().__init__(config)
        self._ready = ready
        self._at_end = at_end

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer."""
        await super().startup(sockets=sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer nothing new, and end."""
        await super().shutdown(sockets=sockets)
        if self._at_end is not None:
            await self._at_end()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals end the server, and are not sent once more when it has ended."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: dict[signal.Signals, Any] = {
            one: signal.signal(one, self.handle_exit) for one in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)
