"""Dense linear layers of a model by the compiled kernels: a decode step outside the experts.

A `FewRowsLinear` reads its weights at memory speed when it runs on a few rows; `pack_linears` also stores
them in fewer bits.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.kernels.coded import stored_matrix
from mixtura.kernels.compiled import is_plain, native, options
from mixtura.kernels.crossing import ALWAYS_FEW, few_rows, multiply
from mixtura.kernels.matrices import KeptMatrix, Matrix, dense_matrix
from mixtura.kernels.records import ROUTER_NAMES
from mixtura.kernels.saving import refuse_save
from mixtura.methods import create
from mixtura.methods.quantizers import Encoded, Quantizer


@final
class FewRowsLinear(nn.Linear):
    """A linear layer that multiplies few rows by the compiled kernels; in all else it is its base.

    Training, other devices and dtypes, many rows, autocast and tracing take PyTorch's own path.
    """

    def forward(self, input: Float[Tensor, "... inputs"]) -> Float[Tensor, "... outputs"]:
        """``input @ weight.T + bias``."""
        if not (torch.is_grad_enabled() and (self.weight.requires_grad or input.requires_grad)):
            found = _few(input, self.weight, self.bias)
            if found is not None:
                return found
        return super().forward(input)


def _few(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    biases = () if bias is None else (bias,)
    if not is_plain(x, weight, *biases) or any(t.dtype != x.dtype for t in (weight, *biases)):
        return None
    if not are_few(x, 8 * weight.element_size()):
        return None
    matrix = dense_matrix(weight)
    return None if matrix is None else multiply(matrix, x, bias)


def are_few(x: Tensor, bits: int) -> bool:
    """Whether the compiled kernels are to multiply these rows with weights of so many bits."""
    chosen = options()
    if chosen.mode == "torch" or native() is None or torch.is_autocast_enabled("cpu"):
        return False
    rows = x.numel() // max(1, x.shape[-1])
    if chosen.mode == "exact" or 0 < rows <= ALWAYS_FEW:
        return rows > 0
    return 0 < rows <= few_rows(bits, x.dtype)


@final
class PackedLinear(nn.Module):
    """A linear layer whose weight is stored in 8, 4 or 2 bits by ``round_to_nearest``.

    Args:
        codes: the weight's codes.
        scales: their scales.
        in_features: width of the inputs.
        bits: of a code.
        group_size: weights that share a scale.
        bias: added to the product.
        dtype: of `weight`.
    """

    codes: Tensor
    scales: Tensor
    like: Tensor

    def __init__(
        self,
        codes: Tensor,
        scales: Tensor,
        *,
        in_features: int,
        bits: int,
        group_size: int,
        bias: Tensor | None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, codes.shape[0]
        self.bits, self.group_size = bits, group_size
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        # Follows the model to another dtype.
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._kept = KeptMatrix()

    @staticmethod
    def of(linear: nn.Linear, *, bits: int, group_size: int = 64) -> PackedLinear:
        """A linear layer's weight in fewer bits."""
        quantizer = _quantizer(bits, group_size)
        tensors = quantizer.encode(linear.weight.detach()).tensors
        bias = None if linear.bias is None else linear.bias.detach()
        sizes = {"in_features": linear.in_features, "bits": bits, "group_size": group_size}
        dtype = linear.weight.dtype
        return PackedLinear(tensors["codes"], tensors["scales"], bias=bias, dtype=dtype, **sizes)

    @property
    def weight(self) -> Float[Tensor, "outputs inputs"]:
        """The weight decoded, for what reads it in place of calling the layer."""
        return self._decoded(self.like.dtype)

    def forward(self, input: Float[Tensor, "... inputs"]) -> Float[Tensor, "... outputs"]:
        """``input @ weight.T + bias``, the weight read as it is stored or, for many rows, decoded."""
        biases = () if self.bias is None else (self.bias,)
        if not (torch.is_grad_enabled() and input.requires_grad) and is_plain(input, *biases):
            matrix = self.matrix()
            if matrix is not None and are_few(input, self.bits):
                return multiply(matrix, input, self.bias)
        return F.linear(input, self._decoded(input.dtype), self.bias)

    def _decoded(self, dtype: torch.dtype) -> Tensor:
        tensors = {"codes": self.codes, "scales": self.scales}
        encoded = Encoded(tensors, {"rows": self.out_features, "cols": self.in_features})
        return _quantizer(self.bits, self.group_size).decode(encoded, dtype)

    def matrix(self) -> Matrix | None:
        """The weight as the kernels read it; None where they cannot."""
        tensors = {"codes": self.codes, "scales": self.scales}
        rows, cols, bits, group_size = self.out_features, self.in_features, self.bits, self.group_size
        return self._kept.get(
            (self.codes, self.scales),
            (cols, bits, group_size),
            lambda: stored_matrix(_quantizer(bits, group_size), tensors, rows=rows, cols=cols),
        )

    def extra_repr(self) -> str:
        """Sizes, as modules print them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"


def pack_linears(
    model: nn.Module,
    *,
    bits: int,
    group_size: int = 64,
    wanted: Callable[[str], bool] = lambda name: True,
) -> int:
    """Store the weights of a model's linear layers in fewer bits, in place.

    A weight that another module shares, such as tied embeddings, is kept there as it was. Left alone are
    routers, whose matrix is how a model's routing is seen and changed, and layers whose owner reads their
    weight in place of calling them. A model of transformers then refuses ``save_pretrained``.

    Args:
        model: whatever holds `torch.nn.Linear` layers.
        bits: 8, with a scale for each row, or 4 or 2, with one for each group.
        group_size: neighbouring weights of a row that share a scale.
        wanted: whether to take the layer of this name.

    Returns:
        How many layers were taken.

    Raises:
        SettingError: ``bits`` or ``group_size`` is out of range.
    """
    return replace_linears(model, wanted, partial(PackedLinear.of, bits=bits, group_size=group_size))


def replace_linears(
    model: nn.Module, wanted: Callable[[str], bool], make: Callable[[nn.Linear], nn.Module]
) -> int:
    """Put another module in the place of each plain linear layer of a wanted name; gives how many."""
    routers = {id(part) for router in _routers(model) for part in router.modules()}
    named = [
        (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], module)
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, FewRowsLinear) and name and wanted(name) and id(module) not in routers
    ]
    replaced = [
        (parent, last, module) for parent, last, module in named if not _reads_weight(type(parent), last)
    ]
    for parent, last, module in replaced:
        assert isinstance(module, nn.Linear)
        setattr(parent, last, make(module))
    if replaced:
        refuse_save(model, "a model with linear layers in fewer bits")
    return len(replaced)


def _routers(model: nn.Module) -> Iterator[nn.Module]:
    """The routers beside experts of transformers' common contract."""
    for block in model.modules():
        if any(hasattr(child, "_is_expert_parallel") for child in block.children()):
            for name in ROUTER_NAMES:
                found = getattr(block, name, None)
                if isinstance(found, nn.Module):
                    yield found


def _reads_weight(owner: type, name: str) -> bool:
    """Whether code of a class reads the weight of its layer of this name, by its source."""
    reads = re.compile(rf"\bself\.{re.escape(name)}\.weight\b")
    for cls in owner.__mro__:
        if issubclass(cls, nn.Module) and not cls.__module__.startswith("torch."):
            try:
                source = inspect.getsource(cls)
            except (OSError, TypeError):
                # Made without a file; the layer that is put there decodes its weight for who reads it.
                continue
            if reads.search(source):
                return True
    return False


def _quantizer(bits: int, group_size: int) -> Quantizer:
    made = create("quantizers", "round_to_nearest", bits=bits, group_size=group_size)
    assert isinstance(made, Quantizer)
    return made
