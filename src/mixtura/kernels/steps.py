"""Forward passes of few tokens: the processors belong to the compiled kernels.

After each of its parallel operators PyTorch's threads spin for a while. In a decode step those operators
are tiny, and what spins takes a processor from the threads that read the weights: measured on two cores,
a layer's experts took 1.6 ms instead of 1.0 ms. So such a pass runs PyTorch's operators on one thread.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn

from mixtura.kernels.compiled import hold_threads, native, options, release_threads
from mixtura.machine.releases import given_cache

# Tokens of a pass up to which PyTorch's operators are tiny, and keys its attention then reads on one thread.
_FEW_TOKENS: Final = 16
_FEW_KEYS: Final = 2048


def quicken_steps(model: nn.Module) -> None:
    """Run a model's passes of few tokens with one thread for PyTorch and all for the compiled kernels."""
    if native() is not None:
        model.register_forward_pre_hook(_before, with_kwargs=True)
        model.register_forward_hook(_after, always_call=True)


def _before(model: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
    tokens = named.get("input_ids", given[0] if given else None)
    tokens = named.get("inputs_embeds") if tokens is None else tokens
    if not isinstance(tokens, Tensor) or tokens.ndim < 2 or tokens.device.type != "cpu":
        return
    num_tokens = tokens.shape[0] * tokens.shape[1]
    if torch.is_grad_enabled() or options().mode == "torch" or num_tokens > _FEW_TOKENS:
        return
    cache = given_cache(named)
    if cache is None or not hasattr(cache, "get_seq_length") or cache.get_seq_length() <= _FEW_KEYS:
        hold_threads()


def _after(model: nn.Module, given: tuple[Any, ...], result: Any) -> None:
    release_threads()
