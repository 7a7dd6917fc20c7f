"""Numbers that a text settles."""

from __future__ import annotations

import hashlib


def fraction(text: str, seed: int | str) -> float:
    """A number in [0, 1) that text and seed settle, as if drawn at random.

    >>> round(fraction("a", 0), 3) == round(fraction("a", 0), 3) != round(fraction("a", 1), 3)
    True
    """
    digest = hashlib.blake2b(f"{seed}\0{text}".encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
