"""The compiled kernels: whether they are there, how they run, and tensors as they want them.

Without them (installed where there was no compiler) everything runs on PyTorch's kernels.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from typing import Any, Final, Literal, final

import torch
from torch import Tensor

from mixtura.errors import UnknownNameError
from mixtura.machine.control_groups import processor_quota


def _load() -> tuple[Any | None, str]:
    """The extension, or None and why there is none."""
    try:
        return import_module("mixtura.kernels._native"), ""
    except ImportError as error:
        return None, str(error)


_native, _why_missing = _load()

Mode = Literal["fast", "exact", "torch"]
MODES: tuple[Mode, ...] = ("fast", "exact", "torch")
# As the extension numbers them.
NUMBERS = {torch.float32: 0, torch.bfloat16: 1}
# By names of their own: in a decode step, finding them in PyTorch's modules takes longer than using them.
_ORDINARY: Final = (Tensor, torch.nn.Parameter)
_STRIDED: Final = torch.strided
is_wrapped: Final[Callable[[Tensor], bool]] = torch._C._functorch.is_functorch_wrapped_tensor
_tracing_state: Final[Callable[[], object]] = torch._C._get_tracing_state
_num_dispatching: Final[Callable[[], int]] = torch._C._len_torch_dispatch_stack
_FLOAT_INPUTS, _BF16_INPUTS, _INT8_INPUTS = 0, 1, 2

_logger = logging.getLogger("mixtura")


@final
@dataclass(frozen=True, slots=True)
class Options:
    """How products with few rows are computed.

    Attributes:
        mode: ``fast`` takes the compiled kernels or PyTorch's, whichever is the faster for the number
            of rows; ``exact`` always the compiled ones, so that a row's result does not depend on what
            else is in the batch nor on the number of threads; ``torch`` always PyTorch's.
        int8_inputs: round inputs to 8 bits with a scale for every 128 or 256 of them where weights are
            codes. Faster where arithmetic is what takes the time; adds an error of 0.6 to 0.7 % of the
            norm of each product.
        isa: instruction set to use, one of `isas`; by default the best that this processor has.
    """

    mode: Mode = "fast"
    int8_inputs: bool = False
    isa: str = ""


def _options_of_environment() -> Options:
    mode = os.environ.get("MIXTURA_KERNELS", "fast")
    return Options(mode=mode if mode in MODES else "fast")


_DEFAULT: Final = _options_of_environment()
_options: ContextVar[Options] = ContextVar("mixtura_kernels", default=_DEFAULT)


def options() -> Options:
    """The options in force here."""
    return _options.get()


@contextmanager
def using(
    mode: str | None = None, *, int8_inputs: bool | None = None, isa: str | None = None
) -> Iterator[Options]:
    """Compute with other `Options` within a ``with`` block; what is not given stays as it is.

    The environment variable ``MIXTURA_KERNELS`` sets the mode outside any block.

    Raises:
        UnknownNameError: the mode is unknown, or this processor does not have the instruction set.

    >>> with using("torch") as chosen:
    ...     chosen.mode
    'torch'
    """
    chosen = options()
    if mode is not None:
        if mode not in MODES:
            raise UnknownNameError("mode of the kernels", mode, MODES)
        chosen = replace(chosen, mode=mode)
    if isa is not None:
        if isa and isa not in isas():
            raise UnknownNameError("instruction set of this processor", isa, isas())
        chosen = replace(chosen, isa=isa)
    if int8_inputs is not None:
        chosen = replace(chosen, int8_inputs=int8_inputs)
    token = _options.set(chosen)
    try:
        yield chosen
    finally:
        _options.reset(token)


def isas() -> tuple[str, ...]:
    """Instruction sets that the compiled kernels can use on this processor, the best last."""
    return () if _native is None else tuple(_native.isas())


def why_missing() -> str:
    """Why there are no compiled kernels; empty where there are."""
    return _why_missing


def native() -> Any | None:
    """The extension, or None where it is missing, which is said once."""
    if _native is None:
        _say_missing()
    return _native


def why_not_native() -> str:
    """Why the compiled kernels are not to run here; nothing where they are."""
    if _native is None:
        return f"mixtura was installed without its compiled kernels ({_why_missing})"
    return "" if options().mode != "torch" else "the kernels' mode is 'torch'"


@cache
def _say_missing() -> None:
    _logger.warning(
        "mixtura was installed without its compiled kernels (%s), so PyTorch's are used, which read weights "
        "more slowly; with a C++ compiler at hand, install it again for the faster ones",
        _why_missing,
    )


def way_for(dtype: torch.dtype) -> Any:
    """The extension's record of how to run on inputs of ``dtype``, by the options in force."""
    chosen = options()
    inputs = _BF16_INPUTS if dtype == torch.bfloat16 else _FLOAT_INPUTS
    return _way(chosen.isa, _INT8_INPUTS if chosen.int8_inputs else inputs, num_threads())


@cache
def _way(isa: str, inputs: int, threads: int) -> Any:
    assert _native is not None
    return _native.Way(isa, inputs, threads)


# PyTorch's own number of threads while it is held to one; 0 where it is not.
_held: ContextVar[int] = ContextVar("mixtura_held_threads", default=0)


def hold_threads() -> None:
    """Hold PyTorch's operators to one thread until `release_threads`; the kernels keep the others."""
    threads = torch.get_num_threads()
    if threads > 1 and not _held.get():
        _held.set(threads)
        torch.set_num_threads(1)


def release_threads() -> None:
    """Give PyTorch back the threads that `hold_threads` took; nothing where it took none."""
    threads = _held.get()
    if threads:
        _held.set(0)
        torch.set_num_threads(threads)


def num_threads() -> int:
    """Threads to run on: as many as PyTorch uses, but no more than there are processors to run them."""
    return min(_held.get() or torch.get_num_threads(), processors())


@cache
def processors() -> int:
    """Processors this process may use, by its affinity and the quotas of its control groups."""
    affinity = getattr(os, "sched_getaffinity", None)
    allowed = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    quota = processor_quota()
    return allowed if quota is None else max(1, min(allowed, math.ceil(quota)))


def is_recorded() -> bool:
    """Whether operations are being compiled, traced or watched, so that they must be PyTorch's own."""
    return torch.compiler.is_compiling() or _tracing_state() is not None or _num_dispatching() > 0


def is_plain(*tensors: Tensor) -> bool:
    """Whether all are ordinary tensors in CPU memory whose numbers the kernels know, and nothing records."""
    return not is_recorded() and all(map(_is_ordinary, tensors))


def _is_ordinary(tensor: Tensor) -> bool:
    return (
        type(tensor) in _ORDINARY
        and tensor.is_cpu
        and tensor.dtype in NUMBERS
        and tensor.layout == _STRIDED
        and not is_wrapped(tensor)
    )


def rows_of(tensor: Tensor | None) -> Any:
    """The extension's record of a tensor of rows, whose last axis is contiguous; of none, an empty one."""
    assert _native is not None
    if tensor is None:
        return _native.Rows(0, 0, 0)
    stride = tensor.stride(0) if tensor.ndim > 1 else 1
    return _native.Rows(tensor.data_ptr(), NUMBERS[tensor.dtype], stride)


def with_rows(tensor: Tensor) -> Tensor:
    """The tensor, copied where its rows are not contiguous."""
    return tensor if tensor.shape[-1] == 1 or tensor.stride(-1) == 1 else tensor.contiguous()
