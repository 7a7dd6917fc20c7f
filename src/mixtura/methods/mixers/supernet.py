"""Mixture-of-Supernets: one set of weights for every width, mixed from several by what the width is."""

from __future__ import annotations

from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.errors import SettingError
from mixtura.methods._drawing import drawn
from mixtura.methods._precision import exact, full_precision
from mixtura.methods.mixers import Mixer
from mixtura.methods.mixers._shared import shares
from mixtura.types import ExpertsHandle, LayerShape, RouterInput, Routing

METHOD = {
    "paper": 81,
    "title": "Mixture-of-Supernets: Improving Weight-Sharing Supernet Training with Architecture-Routed "
    "Mixture-of-Experts",
    "tags": ["token_independent", "reads:training", "reads:generator"],
}


@final
class Supernet(Mixer):
    """Mix the experts' matrices into one feed-forward part by the width that it is to have.

    Each expert is a set of weights. In training every pass draws one of ``widths``; a small network of that
    width, ``a = width / d_expert``, gives probabilities by which the sets are averaged, and the first
    ``width`` hidden features of the average compute all tokens. So sub-networks of all widths are trained at
    once without having to agree on every weight. With ``by="neuron"`` each row of each matrix has
    probabilities of its own. Outside training the width is ``width``, 0 for ``d_expert``; without ``widths``
    it always is.

    Shapes:
        ``x [T, D]`` to ``[T, D]``; parameters ``hidden_weight [H, 1]``, ``hidden_bias [H]``, and for the sets
        ``up_rows [E * R, H]`` with R = 1, by neuron 2F, and by neuron also ``down_rows [E * D, H]``.

    Raises:
        SettingError: ``widths`` or ``width`` is not in [1, F], or ``num_hidden`` not in [1, 1e5].

    Example:
        >>> from mixtura.modeling.layer import Experts
        >>> shape = LayerShape(d_model=4, d_expert=8, num_experts=3)
        >>> output, routing = Supernet(shape, width=2)(RouterInput.of(torch.eye(4)), Experts(shape).matrices)
        >>> output.shape, bool((routing.scores == routing.scores[0]).all())
        (torch.Size([4, 4]), True)

    Differences from the paper:
        Of a sub-network's sizes only the width of this layer varies, where theirs also have other numbers of
        layers, heads and features; sizes are divided by the largest. Widths are drawn for each layer and
        pass. Saving one sub-network by itself is left out. The hidden width of the network is theirs for
        BERT; for translation it is 64.

    Reference:
        Mixture-of-Supernets: Improving Weight-Sharing Supernet Training with Architecture-Routed
        Mixture-of-Experts (paper 81); repository UBC-NLP/MoS, by a summary of its code.
    """

    def __init__(
        self,
        shape: LayerShape,
        *,
        widths: list[int] | None = None,
        width: int = 0,
        by: Literal["layer", "neuron"] = "layer",
        num_hidden: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__(shape)
        if any(not 1 <= one <= shape.d_expert for one in (*(widths or ()), width or shape.d_expert)):
            raise SettingError(
                f"width and widths of Supernet must be in [1, {shape.d_expert}], the layer's d_expert, got "
                f"{width} and {widths}; width 0 is the widest"
            )
        if not 1 <= num_hidden <= 100_000:
            raise SettingError(f"num_hidden of Supernet must be in [1, 1e5], got {num_hidden}")
        self.widths, self.width, self.by, self.num_hidden = widths, width, by, num_hidden
        self.seed = seed
        self.hidden_weight = drawn(seed, num_hidden, 1)
        self.hidden_bias = nn.Parameter(torch.zeros(num_hidden))
        rows = 2 * shape.d_expert if by == "neuron" else 1
        self.up_rows = drawn(seed + 1, shape.num_experts * rows, num_hidden)
        by_neuron = by == "neuron"
        self.down_rows = drawn(seed + 2, shape.num_experts * shape.d_model, num_hidden) if by_neuron else None

    def forward(self, inputs: RouterInput, experts: ExpertsHandle) -> tuple[Float[Tensor, "T D"], Routing]:
        width = self._width(inputs)
        logits = self._logits(width, self.up_rows)
        mix = logits.softmax(0)
        if self.down_rows is None:
            merged = experts.merged(mix.T)
        else:
            # Experts without a gate have the second half of the rows alone.
            count = self.shape.d_expert * (1 if experts.gate is None else 2)
            down = self._logits(width, self.down_rows).softmax(0)
            merged = experts.mixed(mix[:, -count:].T, down.T)
        rows = inputs.valid.nonzero().squeeze(-1)
        made = merged.narrowed(width).run(inputs.x, rows, torch.zeros_like(rows))
        output = torch.zeros_like(inputs.x).index_copy(0, rows, made.to(inputs.x.dtype))
        size = (len(inputs.x), self.shape.num_experts)
        routing = shares(
            mix.mean(1).expand(size), logits=logits.mean(1).expand(size).clone(), valid=inputs.valid
        )
        return output, routing

    def _width(self, inputs: RouterInput) -> int:
        """The width of this pass."""
        if not inputs.training or not self.widths:
            return self.width or self.shape.d_expert
        if inputs.generator is None:
            return max(self.widths)
        return self.widths[int(torch.randint(len(self.widths), (), generator=inputs.generator))]

    @full_precision()
    def _logits(self, width: int, rows: Tensor) -> Float[Tensor, "E R"]:
        """Of each set, for the whole layer or for each row."""
        share = exact(self.hidden_weight)[:, 0] * (width / self.shape.d_expert) + exact(self.hidden_bias)
        return F.linear(F.relu(share), exact(rows)).view(self.shape.num_experts, -1)
