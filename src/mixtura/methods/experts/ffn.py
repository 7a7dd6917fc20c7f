"""The experts of most models: two matrices with an activation between them, gated or not."""

from __future__ import annotations

from typing import Literal, final

import torch
from torch import nn

from mixtura.methods._activations import curve_of
from mixtura.methods.experts import Bank
from mixtura.methods.experts._shared import begun, drawn_matrices
from mixtura.types import LayerShape, Matrices

METHOD = {
    "paper": None,
    "title": "Feed-forward experts: SwiGLU, GELU, ReLU, biased or not",
    "tags": ["materialises", "own_matrices", "token_independent"],
}


@final
class Ffn(Bank):
    """Experts of two matrices: ``down @ (silu(gate @ x) * (up @ x))``, or ungated ``down @ relu(up @ x)``.

    ``activation`` is the curve, ``gated`` whether there is a gate, ``bias`` whether both products have a
    bias, which begins at 0. SwiGLU is the default, as in Mixtral, Qwen3-MoE and DeepSeek-V3. GELU without a
    gate and with a bias makes the experts of a classic transformer, ReLU without a gate those of MoE-X (paper
    59), whose hidden features are sparse enough to be read. Experts are stored as transformers stores them,
    and run through the compiled kernels.

    Shapes:
        ``x [N, D]`` to ``[N, D]``; parameters ``gate_up_proj [E, 2F, D]`` (``[E, F, D]`` without a gate) and
        ``down_proj [E, D, F]``; with a bias also ``up_bias`` and ``down_bias``: 3EFD numbers, 2EFD without
        a gate, and E(F + D) more with a bias (E(2F + D) where gated).

    Raises:
        SettingError: there is no such ``activation``.

    Example:
        >>> bank = Ffn(LayerShape(d_model=4, d_expert=8, num_experts=3), activation="relu", gated=False)
        >>> bank.matrices().gate_up.shape
        torch.Size([3, 8, 4])
    """

    def __init__(
        self,
        shape: LayerShape,
        *,
        activation: Literal["silu", "gelu", "gelu_tanh", "relu", "relu_squared", "tanh", "none"] = "silu",
        gated: bool = True,
        bias: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        self.activation = activation
        self.gated = gated
        self.bias = bias
        self.seed = seed
        generator = begun(seed)
        features = (2 if gated else 1) * shape.d_expert
        self.gate_up_proj = drawn_matrices(generator, shape.num_experts, features, shape.d_model)
        self.down_proj = drawn_matrices(generator, shape.num_experts, shape.d_model, shape.d_expert)
        self.up_bias = nn.Parameter(torch.zeros(shape.num_experts, features)) if bias else None
        self.down_bias = nn.Parameter(torch.zeros(shape.num_experts, shape.d_model)) if bias else None

    def matrices(self) -> Matrices:
        return Matrices(
            self.gate_up_proj,
            self.down_proj,
            curve_of(self.activation, gated=self.gated),
            gated=self.gated,
            up_bias=self.up_bias,
            down_bias=self.down_bias,
        )
