"""What the specimen is compared with: n-gram models and a general compressor."""

from __future__ import annotations

import lzma
from collections.abc import Sequence
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

Symbols = NDArray[np.uint64]


@final
class NGram:
    """An n-gram model with Witten-Bell interpolation down to the uniform distribution.

    An estimate from a context of n-1 symbols is mixed with that from one symbol less; the shorter
    one weighs as much as the context was followed by different symbols. Counts are kept as sorted
    arrays of packed n-grams, so millions of symbols take seconds.

    Args:
        symbols: the training sequence, values below 2 ** `bits_per_symbol`.
        order: n; n times `bits_per_symbol` must be at most 60.
        num_symbols: size of the alphabet.
    """

    def __init__(self, symbols: Symbols, order: int, bits_per_symbol: int, num_symbols: int) -> None:
        assert order * bits_per_symbol <= 60, "packed n-grams must fit an unsigned 64-bit integer"
        self._order = order
        self._bits = np.uint64(bits_per_symbol)
        self._num_symbols = num_symbols
        self._tables = [self._count(symbols, length) for length in range(1, order + 1)]

    def _pack(self, symbols: Symbols, length: int) -> Symbols:
        """All n-grams of a length as integers, in order of their last symbol."""
        count = len(symbols) - length + 1
        packed = np.zeros(count, dtype=np.uint64)
        for place in range(length):
            packed = (packed << self._bits) | symbols[place : place + count]
        return packed

    def _count(self, symbols: Symbols, length: int) -> tuple[NDArray[Any], ...]:
        grams, counts = np.unique(self._pack(symbols, length), return_counts=True)
        contexts, first, kinds = np.unique(grams >> self._bits, return_index=True, return_counts=True)
        totals = np.add.reduceat(counts, first)
        return grams, counts, contexts, totals, kinds

    @staticmethod
    def _look_up(keys: NDArray[Any], values: NDArray[Any], wanted: Symbols) -> NDArray[np.float64]:
        """The value of each wanted key, 0 for keys that are absent."""
        places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return np.where(keys[places] == wanted, values[places], 0).astype(np.float64)

    def bits(self, symbols: Symbols) -> float:
        """Bits needed for a sequence; its first symbols are predicted from shorter contexts."""
        chance = np.full(len(symbols), 1.0 / self._num_symbols)
        for length, (grams, counts, contexts, totals, kinds) in enumerate(self._tables, start=1):
            if length > len(symbols):
                break
            packed = self._pack(symbols, length)
            context = packed >> self._bits
            seen = self._look_up(grams, counts, packed)
            total = self._look_up(contexts, totals, context)
            different = self._look_up(contexts, kinds, context)
            tail = chance[length - 1 :]
            known = total > 0
            weight = np.where(known, total + different, 1.0)
            mixed = (seen + different * tail) / weight
            chance[length - 1 :] = np.where(known, mixed, tail)
        return float(-np.log2(chance).sum())


def byte_symbols(text: str) -> Symbols:
    """The UTF-8 bytes of a text."""
    return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint64)


def byte_ngram_bits(training: str, texts: Sequence[str], order: int = 5) -> float:
    """Bits a byte-level n-gram model of the training text needs for some texts."""
    model = NGram(byte_symbols(training), order, 8, 256)
    return sum(model.bits(byte_symbols(text)) for text in texts)


def token_ngram_bits(
    training: Sequence[int], texts: Sequence[Sequence[int]], vocabulary: int, order: int = 5
) -> float:
    """Bits a token-level n-gram model needs for texts of tokens, the first token of each given."""
    width = max(1, (vocabulary - 1).bit_length())
    model = NGram(np.asarray(training, dtype=np.uint64), order, width, vocabulary)
    total = 0.0
    for ids in texts:
        symbols = np.asarray(ids, dtype=np.uint64)
        total += model.bits(symbols) - model.bits(symbols[:1])
    return total


def xz_bytes(text: str) -> int:
    """Size of a text compressed by xz at its strongest setting."""
    return len(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))


def xz_alone_bits(texts: Sequence[str]) -> float:
    """Bits xz needs for texts, each compressed by itself."""
    return 8.0 * sum(xz_bytes(text) for text in texts)


def xz_primed_bits(training: str, texts: Sequence[str]) -> float:
    """Bits xz needs for all texts together after it has read the training text."""
    return 8.0 * (xz_bytes(training + "".join(texts)) - xz_bytes(training))
