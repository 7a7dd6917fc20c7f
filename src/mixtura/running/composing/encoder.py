"""Texts as vectors: what routers read of a prompt."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Final, final

import numpy as np
from jaxtyping import Float

from mixtura.errors import UserError, check_range
from mixtura.types.models import Prompt, PromptBatch

# Any callable from texts to one vector each, such as the `encode` of a sentence-transformers model.
Encode = Callable[[Sequence[str]], Any]
HASHED: Final = "hashed"
_WORD: Final = re.compile(r"\w+", re.UNICODE)


@final
class HashedTfidf:
    """Words and pairs of words, hashed into a fixed number of features with a sign each, weighted by rarity.

    Needs no vocabulary, no download and no library, gives any text a vector, and the same one everywhere.

    Args:
        width: features.
        rarity: weight of each feature, that `fit` learned; equal weights where that is None.
    """

    def __init__(self, width: int = 1024, rarity: Float[np.ndarray, " C"] | None = None) -> None:
        check_range("HashedTfidf", "width", width, 1, 2**20)
        self.width = width
        self.rarity = np.ones(width) if rarity is None else rarity

    def fit(self, texts: Sequence[str]) -> None:
        """Learn how rare each feature is: ``log((1 + texts) / (1 + texts that have it)) + 1``."""
        counts = np.zeros(self.width)
        for text in texts:
            counts[np.unique(np.abs(self._features(text)) - 1)] += 1
        self.rarity = np.log((1 + len(texts)) / (1 + counts)) + 1

    def __call__(self, texts: Sequence[str]) -> Float[np.ndarray, "P C"]:
        """One row a text, of length one, or zero where it has no word."""
        out = np.zeros((len(texts), self.width))
        for row, text in enumerate(texts):
            signed = self._features(text)
            np.add.at(out[row], np.abs(signed) - 1, np.sign(signed))
        # What is said often says less each time.
        out = np.sign(out) * np.log1p(np.abs(out)) * self.rarity
        return unit_rows(out)

    def _features(self, text: str) -> np.ndarray:
        """Numbers of the features of a text, from 1, negative where their sign is."""
        words = _WORD.findall(text.lower())
        pieces = [*words, *(f"{a} {b}" for a, b in pairwise(words))]
        hashes = np.array([zlib.crc32(piece.encode("utf-8", "replace")) for piece in pieces], dtype=np.int64)
        return (hashes % self.width + 1) * np.where((hashes >> 24) & 1, 1, -1)


@final
class Remembered:
    """An encoder that is asked each text once; the rest is remembered."""

    def __init__(self, encode: Encode) -> None:
        self._encode = encode
        self._rows: dict[str, np.ndarray] = {}

    def __call__(self, texts: Sequence[str]) -> Float[np.ndarray, "P C"]:
        """One row a text."""
        new = [text for text in dict.fromkeys(texts) if text not in self._rows]
        if new or not texts:
            found = np.asarray(self._encode(new), dtype=float)
            if not texts:
                return found
            self._rows |= dict(zip(new, found, strict=True))
        return np.stack([self._rows[text] for text in texts])


def unit_rows(rows: Float[np.ndarray, "P C"]) -> Float[np.ndarray, "P C"]:
    """The rows with length one; rows of zeros stay."""
    out: np.ndarray = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return out


def embed(prompts: Sequence[Prompt], encode: Encode) -> PromptBatch:
    """Prompts with an embedding each.

    Raises:
        UserError: the encoder does not give one finite vector a text.
    """
    rows = np.asarray(encode([prompt.text for prompt in prompts]), dtype=float)
    if not prompts:
        rows = rows.reshape(0, rows.shape[-1] if rows.ndim == 2 else 1)
    if rows.ndim != 2 or len(rows) != len(prompts) or not np.isfinite(rows).all():
        raise UserError(
            f"the encoder gave an array of shape {rows.shape} for {len(prompts)} texts; it must give one "
            "vector of finite numbers a text"
        )
    return PromptBatch(tuple(prompts), unit_rows(rows))


def encoder_state(encode: Encode) -> tuple[str, Mapping[str, np.ndarray]]:
    """The name and arrays of an encoder, to be saved; one that is not ours has a name alone."""
    if isinstance(encode, HashedTfidf):
        return HASHED, {"rarity": encode.rarity}
    owner = getattr(encode, "__self__", encode)
    named = type(owner) if owner is not encode else encode
    return getattr(named, "__qualname__", "callable"), {}
