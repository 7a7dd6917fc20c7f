"""Dense linear layers of a model by the compiled kernels: a decode step outside the experts.

A `FewRowsLinear` reads its weights at memory speed when it runs on a few rows; `pack_linears` also stores
them in fewer bits.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterator
from functools import cache, partial
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.errors import SettingError
from mixtura.kernels.coded import stored_matrix
from mixtura.kernels.compiled import is_plain, native, options
from mixtura.kernels.crossing import ALWAYS_FEW, few_rows, multiply
from mixtura.kernels.matrices import KeptMatrix, Matrix, dense_matrix
from mixtura.kernels.records import ROUTER_NAMES
from mixtura.kernels.saving import refuse_save
from mixtura.methods import create
from mixtura.methods.quantizers import Encoded, Quantizer

# Of a weight in fewer bits, how much is decoded at a time where many rows are multiplied with it.
_DECODED_WEIGHTS = 4 << 20


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
    """A linear layer whose weight is stored in fewer bits, by a quantizer whose form is ``levels``.

    Args:
        codes: the weight's codes.
        scales: their scales.
        quantizer: what stored it.
        in_features: width of the inputs.
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
        quantizer: Quantizer,
        in_features: int,
        bias: Tensor | None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.bits = bits_of_levels(quantizer)
        self.in_features, self.out_features = in_features, codes.shape[0]
        self.quantizer = quantizer
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        # Follows the model to another dtype.
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._kept = KeptMatrix()

    @staticmethod
    def of(linear: nn.Linear, *, bits: int, group_size: int = 64) -> PackedLinear:
        """A linear layer's weight in fewer bits, by ``round_to_nearest``."""
        quantizer = create("quantizers", "round_to_nearest", bits=bits, group_size=group_size)
        assert isinstance(quantizer, Quantizer)
        tensors = quantizer.encode(linear.weight.detach()).tensors
        return PackedLinear(
            tensors["codes"],
            tensors["scales"],
            quantizer=quantizer,
            in_features=linear.in_features,
            bias=None if linear.bias is None else linear.bias.detach(),
            dtype=linear.weight.dtype,
        )

    @property
    def weight(self) -> Float[Tensor, "outputs inputs"]:
        """The weight decoded, for what reads it in place of calling the layer."""
        return decoded_rows(self.quantizer, self.codes, self.scales, self.in_features, self.like.dtype)

    def forward(self, input: Float[Tensor, "... inputs"]) -> Float[Tensor, "... outputs"]:
        """``input @ weight.T + bias``, the weight read as it is stored or, for many rows, decoded."""
        biases = () if self.bias is None else (self.bias,)
        if not (torch.is_grad_enabled() and input.requires_grad) and is_plain(input, *biases):
            matrix = self.matrix()
            if matrix is not None and are_few(input, self.bits):
                return multiply(matrix, input, self.bias)
        return self._by_pieces(input)

    def _by_pieces(self, x: Tensor) -> Tensor:
        """The product with a weight of which only so many rows are decoded at a time."""
        rows = max(1, _DECODED_WEIGHTS // self.in_features)
        pieces = [
            F.linear(
                x,
                decoded_rows(self.quantizer, codes, scales, self.in_features, x.dtype),
                None if self.bias is None else self.bias[first : first + rows],
            )
            for first, codes, scales in zip(
                range(0, self.out_features, rows),
                self.codes.split(rows),
                self.scales.split(rows),
                strict=True,
            )
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)

    def matrix(self) -> Matrix | None:
        """The weight as the kernels read it; None where they cannot."""
        tensors = {"codes": self.codes, "scales": self.scales}
        rows, cols = self.out_features, self.in_features
        return self._kept.get(
            (self.codes, self.scales),
            (cols,),
            lambda: stored_matrix(self.quantizer, tensors, rows=rows, cols=cols),
        )

    def extra_repr(self) -> str:
        """Sizes, as modules print them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"


@final
class PackedEmbedding(nn.Module):
    """A table of embeddings stored in fewer bits, by a quantizer whose form is ``levels``; rows are decoded.

    Args:
        codes: of the table.
        scales: their scales.
        quantizer: what stored it.
        embedding_dim: width of a row.
        padding_idx: as `torch.nn.Embedding` has it.
        dtype: of the rows.
    """

    codes: Tensor
    scales: Tensor
    like: Tensor

    def __init__(
        self,
        codes: Tensor,
        scales: Tensor,
        *,
        quantizer: Quantizer,
        embedding_dim: int,
        padding_idx: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.bits = bits_of_levels(quantizer)
        self.num_embeddings, self.embedding_dim = codes.shape[0], embedding_dim
        self.padding_idx = padding_idx
        self.quantizer = quantizer
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    @property
    def weight(self) -> Float[Tensor, "rows width"]:
        """The whole table decoded, for what reads it in place of looking rows up."""
        return decoded_rows(self.quantizer, self.codes, self.scales, self.embedding_dim, self.like.dtype)

    def forward(self, input: Int[Tensor, "..."]) -> Float[Tensor, "... width"]:
        """The rows of these numbers."""
        wanted = input.reshape(-1)
        rows = decoded_rows(
            self.quantizer, self.codes[wanted], self.scales[wanted], self.embedding_dim, self.like.dtype
        )
        return rows.view(*input.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        """Sizes, as modules print them."""
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.bits}"


def bits_of_levels(quantizer: Any) -> int:
    """Bits of a quantizer whose rows can be read one by one.

    Raises:
        SettingError: its form is not ``levels``.
    """
    if quantizer.form != "levels":
        raise SettingError(
            f"{type(quantizer).__name__} stores rows together, and a matrix outside the experts is read row "
            "by row; take round_to_nearest or gptq"
        )
    return int(quantizer.bits)


def decoded_rows(
    quantizer: Quantizer, codes: Tensor, scales: Tensor, cols: int, dtype: torch.dtype
) -> Float[Tensor, "R C"]:
    """Rows of a matrix that a quantizer of the form ``levels`` stored."""
    encoded = Encoded({"codes": codes, "scales": scales}, {"rows": codes.shape[0], "cols": cols})
    return quantizer.decode(encoded, dtype)


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
    replaced = [held for held in packable_modules(model, (nn.Linear, FewRowsLinear)) if wanted(held.name)]
    for held in replaced:
        assert isinstance(held.module, nn.Linear)
        setattr(held.owner, held.attribute, make(held.module))
    if replaced:
        refuse_save(model, "a model with linear layers in fewer bits")
    return len(replaced)


class Held(NamedTuple):
    """A module of a model, and where it is."""

    name: str
    owner: nn.Module
    attribute: str
    module: nn.Module


def packable_modules(
    model: nn.Module, types: Collection[type] = (nn.Linear, FewRowsLinear, nn.Embedding)
) -> list[Held]:
    """The modules of these very types in whose place one in fewer bits may be put.

    Not among them are routers, whose matrix is how a model's routing is seen and changed, and modules whose
    owner reads their weight in place of calling them.
    """
    routers = {id(part) for router in _routers(model) for part in router.modules()}
    named = [
        Held(name, model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], module)
        for name, module in model.named_modules()
        if type(module) in types and name and id(module) not in routers
    ]
    # mypy does not see that classes can be hashed.
    return [held for held in named if not _reads_weight(type(held.owner), held.attribute)]  # type: ignore[arg-type]


def _routers(model: nn.Module) -> Iterator[nn.Module]:
    """The routers beside experts of transformers' common contract."""
    for block in model.modules():
        if any(hasattr(child, "_is_expert_parallel") for child in block.children()):
            for name in ROUTER_NAMES:
                found = getattr(block, name, None)
                if isinstance(found, nn.Module):
                    yield found


@cache
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
