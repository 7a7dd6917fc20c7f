"""What a model takes in memory: accounted for from its headers, and measured in a process of its own."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixtura.running.memory.accounting import MemoryAccount, account, tokenizer_bytes
    from mixtura.running.memory.measuring import MeasuredGeneration, measure_generating, runtime_bytes

__all__ = [
    "MemoryAccount",
    "MeasuredGeneration",
    "account",
    "measure_generating",
    "runtime_bytes",
    "tokenizer_bytes",
]

_HOMES = {
    "MemoryAccount": "accounting",
    "account": "accounting",
    "tokenizer_bytes": "accounting",
    "MeasuredGeneration": "measuring",
    "measure_generating": "measuring",
    "runtime_bytes": "measuring",
}


def __getattr__(name: str) -> Any:
    # `mixtura.running.memory.process` must be importable before PyTorch is.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
