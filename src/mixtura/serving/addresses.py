"""Where a server listens, and the keys that it wants: read before anything heavy is imported."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import Final

from mixtura.errors import UserError

LOOPBACK: Final = {"localhost", "127.0.0.1", "::1"}
KEYS_VARIABLE = "MIXTURA_API_KEYS"
_BACKLOG = 2048


def bound(host: str, port: int) -> socket.socket:
    """A socket that has its port, before anything that takes long is begun.

    Raises:
        UserError: the port is taken or not to be had, or there is no such host.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"there is no host {host!r} to listen on ({reason}); give --host 127.0.0.1") from None
    family, kind, protocol, _, address = found[0]
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind(address)
        # Now and not when the model is there: whoever is second is told at once.
        made.listen(_BACKLOG)
    except OSError as error:
        made.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"port {port} of {host} is in use; give another with --port, or 0 for any that is free"
            ) from None
        reason = error.strerror or str(error)
        raise UserError(f"cannot listen on port {port} of {host}: {reason}; give another --port") from None
    return made


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host."""
    return host.lower() in LOOPBACK or host.startswith("127.")


def read_keys(file: Path | None) -> tuple[str, ...]:
    """API keys: a line each of a file, and those of the environment's `KEYS_VARIABLE`, with commas between.

    Raises:
        UserError: the file cannot be read, or has none.
    """
    keys = [key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",")]
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise UserError(f"cannot read the API keys in {file}: {reason}; give one key a line") from None
        own = [line.strip() for line in lines if line.strip()]
        if not own:
            raise UserError(f"{file} has no API keys; give one key a line")
        keys += own
    return tuple(dict.fromkeys(key for key in keys if key))
