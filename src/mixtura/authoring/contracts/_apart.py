"""Compile a method in a process of its own, where nothing but PyTorch looks into its functions."""

from __future__ import annotations

from typing import Any

import torch

from mixtura.authoring.contracts._core import Subject, require, subject
from mixtura.authoring.contracts._processes import run_apart


def require_compiles(method: Subject) -> None:
    """Raise unless ``torch.compile`` of the module gives what the module gives.

    The contract of its kind says by ``close(left, right)`` when two results are the same.
    """
    run_apart(_work, 1, method.header.kind, str(method.header.path))


def _work(rank: int, kind: str, path: str) -> None:
    del rank
    torch.set_num_threads(1)
    torch.compiler.reset()
    method = subject(kind, path)
    contract, module = method.contract, method.create()
    compiled: Any = torch.compile(module)
    plain, fast = (contract.use(made, contract.sample(method, 30)) for made in (module, compiled))
    require(contract.close(plain, fast), "torch.compile changes the result")
