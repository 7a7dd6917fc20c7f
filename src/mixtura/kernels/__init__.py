"""Expert matmuls, compiled and in PyTorch, and the experts backend for transformers.

`routed_experts` runs a mixture of experts from plain tensors. `register_backend` makes the same
kernels available to every transformers model as ``experts_implementation="mixtura"``:

>>> import mixtura
>>> mixtura.register_backend()
>>> from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
>>> "mixtura" in ALL_EXPERTS_FUNCTIONS
True
"""

from __future__ import annotations

from torch import nn

from mixtura.kernels import coding  # noqa: F401 - puts the compiled search in its place
from mixtura.kernels.coded import stored_matrix
from mixtura.kernels.compiled import Options, isas, options, using
from mixtura.kernels.dispatch import Dispatch, Run, sort_by_expert, sum_by_token
from mixtura.kernels.experts import ExpertMath, StackedExperts, run_experts
from mixtura.kernels.few import ExpertMatrices, NativeLayer
from mixtura.kernels.linears import (
    FewRowsLinear,
    PackedEmbedding,
    PackedLinear,
    pack_linears,
    packable_modules,
)
from mixtura.kernels.matrices import Matrix, coded_matrix, dense_matrix, nested_matrix, trellis_matrix
from mixtura.kernels.nested_linears import NestedLinear, nest_linears
from mixtura.kernels.records import AssignmentObserver, ExpertStore, ExpertTensors, LendingStore
from mixtura.kernels.routed import routed_experts, run_routed

__all__ = [
    "AssignmentObserver",
    "Dispatch",
    "ExpertMath",
    "ExpertMatrices",
    "ExpertStore",
    "ExpertTensors",
    "FewRowsLinear",
    "LendingStore",
    "Matrix",
    "NativeLayer",
    "NestedLinear",
    "Options",
    "PackedEmbedding",
    "PackedLinear",
    "Run",
    "StackedExperts",
    "coded_matrix",
    "dense_matrix",
    "isas",
    "nest_linears",
    "nested_matrix",
    "options",
    "pack_linears",
    "packable_modules",
    "quicken",
    "register_backend",
    "routed_experts",
    "run_experts",
    "run_routed",
    "sort_by_expert",
    "stored_matrix",
    "sum_by_token",
    "trellis_matrix",
    "using",
]


def register_backend() -> None:
    """Make ``experts_implementation="mixtura"`` known to transformers. Calling it again is harmless."""
    from mixtura.kernels.backend import register

    register()


def quicken(model: nn.Module) -> int:
    """Let a model run passes of few tokens by the compiled kernels, its linear layers among them.

    Only layers that are plain `torch.nn.Linear` are taken; parameters, ``state_dict`` and training stay
    as they are. What then runs how, `mixtura.kernels.paths.paths_of` says.

    Returns:
        How many layers were taken; 0 where the compiled kernels are missing.
    """
    # It knows transformers, which is imported where it is used.
    from mixtura.kernels.quickening import quicken

    return quicken(model)
