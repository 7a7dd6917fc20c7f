"""Linear layers that hold their weight once and read it at 8, 4 or 2 bits."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.errors import SettingError
from mixtura.kernels.compiled import is_plain
from mixtura.kernels.crossing import multiply
from mixtura.kernels.linears import are_few, replace_linears
from mixtura.kernels.matrices import Matrix, nested_matrix
from mixtura.methods import create
from mixtura.methods.quantizers import Encoded, Quantizer


@final
class NestedLinear(nn.Module):
    """A linear layer whose weight is stored by ``nested``; its `bits` may be set at any time.

    Args:
        tensors: the weight's codes and scales, of all its widths.
        in_features: width of the inputs.
        out_features: width of the outputs.
        group_size: weights that share a scale.
        bias: added to the product.
        dtype: of `weight`.
    """

    like: Tensor

    def __init__(
        self,
        tensors: dict[str, Tensor],
        *,
        in_features: int,
        out_features: int,
        group_size: int,
        bias: Tensor | None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.group_size = in_features, out_features, group_size
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        # Follows the model to another dtype.
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._bits = 8

    @staticmethod
    def of(linear: nn.Linear, *, group_size: int = 64) -> NestedLinear:
        """A linear layer's weight in nested codes."""
        tensors = _quantizer(group_size).encode(linear.weight.detach()).tensors
        bias = None if linear.bias is None else linear.bias.detach()
        sizes = {"in_features": linear.in_features, "out_features": linear.out_features}
        return NestedLinear(tensors, group_size=group_size, bias=bias, dtype=linear.weight.dtype, **sizes)

    @property
    def weight(self) -> Float[Tensor, "outputs inputs"]:
        """The weight decoded at `bits`, for what reads it in place of calling the layer."""
        return self._decoded(self.like.dtype)

    @property
    def bits(self) -> int:
        """Bits that a weight is read at: 8, 4 or 2."""
        return self._bits

    @bits.setter
    def bits(self, bits: int) -> None:
        if bits not in (8, 4, 2):
            raise SettingError(f"bits of a nested linear layer must be 8, 4 or 2, got {bits!r}")
        self._bits = bits

    def forward(self, input: Float[Tensor, "... inputs"]) -> Float[Tensor, "... outputs"]:
        """``input @ weight.T + bias``, the weight read as it is stored or, for many rows, decoded."""
        biases = () if self.bias is None else (self.bias,)
        if not (torch.is_grad_enabled() and input.requires_grad) and is_plain(input, *biases):
            matrix = self.matrix()
            if matrix is not None and are_few(input, self._bits):
                return multiply(matrix, input, self.bias)
        return F.linear(input, self._decoded(input.dtype), self.bias)

    def _decoded(self, dtype: torch.dtype) -> Tensor:
        encoded = Encoded(self._read(), {"rows": self.out_features, "cols": self.in_features})
        return _quantizer(self.group_size).decode(encoded, dtype)

    def matrix(self) -> Matrix | None:
        """The weight as the kernels read it; None where they cannot."""
        *planes, scales = self._read().values()
        group = min(self.group_size, self.in_features)
        return nested_matrix(planes, scales, cols=self.in_features, bits=self._bits, group=group)

    def _read(self) -> dict[str, Tensor]:
        """What reading at these bits touches."""
        return {name: self.get_buffer(name) for name in _quantizer(self.group_size).widths[self._bits]}

    def extra_repr(self) -> str:
        """Sizes, as modules print them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self._bits}"


def nest_linears(
    model: nn.Module, *, group_size: int = 64, wanted: Callable[[str], bool] = lambda name: True
) -> int:
    """Store the weights of a model's linear layers in nested codes, in place; all are read at 8 bits.

    A weight that another module shares, such as tied embeddings, is kept there as it was. What is left
    alone, and that the model is not saved, is as for `pack_linears`.

    Args:
        model: whatever holds `torch.nn.Linear` layers.
        group_size: neighbouring weights of a row that share a scale.
        wanted: whether to take the layer of this name.

    Returns:
        How many layers were taken.

    Raises:
        SettingError: ``group_size`` is out of range.
    """
    return replace_linears(model, wanted, lambda linear: NestedLinear.of(linear, group_size=group_size))


@cache
def _quantizer(group_size: int) -> Quantizer:
    # Kept, because every call asks it what to read, and finding a method reads its file.
    made = create("quantizers", "nested", group_size=group_size)
    assert isinstance(made, Quantizer)
    return made
