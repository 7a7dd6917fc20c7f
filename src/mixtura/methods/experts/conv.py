"""Convolutional experts: each reads a token together with the ones before it."""

from __future__ import annotations

from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mixtura.methods._activations import CURVES
from mixtura.methods.experts import Bank
from mixtura.methods.experts._shared import begun, drawn_matrices, grouped
from mixtura.types import LayerShape, Ran, RouterInput, Rows

METHOD = {
    "paper": 58,
    "title": "Unraveling Complex Data Diversity in Underwater Acoustic Target Recognition through "
    "Convolution-based Mixture of Experts",
    "tags": ["reads:sequence_ids", "reads:positions", "reads:history"],
}


@final
class Conv(Bank):
    """Experts that filter each feature over a token and the ``kernel - 1`` before it, then act on the result.

    Expert e computes ``down_e act(up_e (sum_j k_e[j] * x[t - j]))`` with a filter ``k_e`` for each feature
    (depthwise, causal). A token's neighbours are those of its own sequence, whichever experts they went to;
    padding and places before the first token count as zeros. When text is generated the last tokens of each
    sequence are remembered beside the cache. At first a filter passes the token itself on.

    Shapes:
        ``x [N, D]`` to ``[N, D]``; parameters ``filters [E, kernel, D]``, ``up_proj [E, F, D]`` and
        ``down_proj [E, D, F]``.

    Raises:
        SettingError: ``kernel`` is not in [1, 1024], or there is no such ``activation``.

    Example:
        >>> bank = Conv(LayerShape(d_model=4, d_expert=8, num_experts=3), kernel=3)
        >>> sum(one.numel() for one in bank.parameters())  # 3 * (3 * 4 + 2 * 32)
        228

    Differences from the paper:
        The paper classifies pooled recordings, and in the authors' code its experts are single linear layers
        behind a convolutional network; convolutions as experts of tokens are ours, after the paper's title,
        and so are all their sizes.

    Reference:
        Unraveling Complex Data Diversity in Underwater Acoustic Target Recognition through Convolution-based
        Mixture of Experts (paper 58); repository xy980523/UATR-CMoE.
    """

    def __init__(
        self,
        shape: LayerShape,
        *,
        kernel: int = 4,
        activation: Literal["silu", "gelu", "gelu_tanh", "relu", "relu_squared", "tanh", "none"] = "silu",
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        self.kernel = self.within("kernel", kernel, 1, 1024)
        self.activation = activation
        self.seed = seed
        generator = begun(seed)
        self.up_proj = drawn_matrices(generator, shape.num_experts, shape.d_expert, shape.d_model)
        self.down_proj = drawn_matrices(generator, shape.num_experts, shape.d_model, shape.d_expert)
        filters = torch.zeros(shape.num_experts, kernel, shape.d_model)
        filters[:, 0] = 1.0
        self.filters = nn.Parameter(filters)

    @torch.no_grad()
    def rescale(self, deviation: float) -> None:
        for matrix in (self.up_proj, self.down_proj):
            matrix.mul_(deviation * matrix.shape[-1] ** 0.5)

    def run(self, rows: Rows) -> Ran:
        window, history = before(rows.x, rows.inputs, self.kernel - 1)
        filters = self.filters[rows.expert_ids]
        read = filters[:, 0] * rows.gathered
        for back in range(1, self.kernel):
            read = read + filters[:, back] * window[rows.token_ids, back - 1]
        hidden = CURVES[self.activation](grouped(read, self.up_proj, rows.offsets))
        return Ran(grouped(hidden, self.down_proj, rows.offsets), history)


def before(
    x: Float[Tensor, "T D"], inputs: RouterInput, count: int
) -> tuple[Float[Tensor, "T J D"], dict[str, Tensor]]:
    """The ``count`` tokens before each in its sequence, nearest first, zeros where there are none.

    The history holds the last ``count`` tokens of each sequence, nearest first.
    """
    if count == 0:
        return x.new_zeros(x.shape[0], 0, x.shape[1]), {}
    positions, sequences = inputs.need("positions", "Conv"), inputs.sequences
    past = inputs.history.get("tokens")
    num_sequences = int(sequences.max()) + 1 if sequences.numel() else 0
    if past is not None:
        num_sequences = max(num_sequences, past.shape[0])
    rows = inputs.valid.nonzero().squeeze(-1)
    first = positions.new_full((num_sequences,), 1 << 40)
    first = first.scatter_reduce(0, sequences[rows], positions[rows], "amin")
    place = (positions - first[sequences]).clamp(min=0) if rows.numel() else torch.zeros_like(positions)
    length = int(place[rows].max()) + 1 if rows.numel() else 0
    table = x.new_zeros(num_sequences, count + length, x.shape[1])
    if past is not None:
        table[: past.shape[0], :count] = past.to(x).flip(1)
    table = table.index_put((sequences[rows], count + place[rows]), x[rows])
    back = torch.arange(1, count + 1, device=x.device)
    columns = (count + place[:, None] - back).clamp(max=count + length - 1)
    window = table[sequences[:, None], columns]
    ends = positions.new_zeros(num_sequences).scatter_reduce(0, sequences[rows], place[rows] + 1, "amax")
    last = table[torch.arange(num_sequences, device=x.device)[:, None], count + ends[:, None] - back]
    return window, {"tokens": last}
