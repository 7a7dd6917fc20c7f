"""OmniMoE's experts: one vector that reads and one that writes, so that there can be very many."""

from __future__ import annotations

from typing import Literal, final

from mixtura.errors import SettingError
from mixtura.methods._activations import curve_of
from mixtura.methods.experts import Bank
from mixtura.methods.experts._shared import begun, drawn_matrices
from mixtura.types import LayerShape, Matrices, Ran, Rows

METHOD = {
    "paper": 62,
    "title": "OmniMoE: An Efficient MoE by Orchestrating Atomic Experts at Scale",
    "tags": ["materialises", "own_matrices", "token_independent"],
}


@final
class Atomic(Bank):
    """Experts of one hidden feature: ``act(u_e . x) * d_e``, two vectors each.

    A token takes many of very many of them. With the router ``product_key``, which finds the best of E
    experts among sqrt(E) rows and as many columns, nothing of size ``[T, E]`` is ever made: 10^5 experts cost
    a token what its chosen ones cost. ``d_expert`` is 1; the dense part beside them is ``shared_width``.

    Shapes:
        ``x [N, D]`` to ``[N, D]``; parameters ``gate_up_proj [E, 1, D]`` and ``down_proj [E, D, 1]``: 2ED
        numbers.

    Raises:
        SettingError: ``d_expert`` of the layer is not 1, or there is no such ``activation``.

    Example:
        >>> bank = Atomic(LayerShape(d_model=4, d_expert=1, num_experts=100))
        >>> sum(one.numel() for one in bank.parameters())
        800

    Differences from the paper:
        In the authors' code both tables are drawn from a standard normal distribution, which grows with the
        width; here as all experts are. The number of experts is any, not a square.

    Reference:
        OmniMoE: An Efficient MoE by Orchestrating Atomic Experts at Scale (paper 62); repository
        flash-algo/omni-moe.
    """

    def __init__(
        self,
        shape: LayerShape,
        *,
        activation: Literal["silu", "gelu", "gelu_tanh", "relu", "relu_squared", "tanh", "none"] = "silu",
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        if shape.d_expert != 1:
            raise SettingError(
                f"d_expert must be 1 with the experts atomic, whose experts have one hidden feature, got "
                f"{shape.d_expert}"
            )
        self.activation = activation
        self.seed = seed
        generator = begun(seed)
        self.gate_up_proj = drawn_matrices(generator, shape.num_experts, 1, shape.d_model)
        self.down_proj = drawn_matrices(generator, shape.num_experts, shape.d_model, 1)

    def matrices(self) -> Matrices:
        return Matrices(
            self.gate_up_proj, self.down_proj, curve_of(self.activation, gated=False), gated=False
        )

    def run(self, rows: Rows) -> Ran:
        # By gathering, not expert by expert: few rows meet at each of very many experts.
        read = self.gate_up_proj[rows.expert_ids, 0]
        hidden = (read * rows.gathered).sum(-1, keepdim=True)
        return Ran(curve_of(self.activation, gated=False)(hidden) * self.down_proj[rows.expert_ids, :, 0])
