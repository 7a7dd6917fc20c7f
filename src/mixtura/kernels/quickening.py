"""Let the parts of a model that is there run few tokens by the compiled kernels."""

from __future__ import annotations

from torch import nn

from mixtura.kernels.compiled import native
from mixtura.kernels.linears import FewRowsLinear
from mixtura.kernels.step_layer import quicken_layers
from mixtura.kernels.step_stack import quicken_stacks
from mixtura.kernels.steps import quicken_steps


def quicken(model: nn.Module) -> int:
    """What `mixtura.kernels.quicken` does."""
    if native() is None:
        return 0
    taken = [module for module in model.modules() if type(module) is nn.Linear]
    for module in taken:
        module.__class__ = FewRowsLinear
    quicken_layers(model)
    quicken_stacks(model)
    quicken_steps(model)
    return len(taken)
