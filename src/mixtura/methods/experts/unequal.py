"""Experts of different widths in one layer, such as a big and a small one."""

from __future__ import annotations

from typing import final

import torch
from torch.nn import functional as F

from mixtura.errors import SettingError
from mixtura.methods._activations import swiglu
from mixtura.methods.experts import Bank
from mixtura.methods.experts._shared import begun, drawn_matrices
from mixtura.types import LayerShape, Matrices

METHOD = {
    "paper": 138,
    "title": "Duo-LLM: A Framework for Studying Adaptive Computation in Large Language Models",
    "tags": ["materialises", "token_independent"],
}
_MOST = 1 << 30


@final
class Unequal(Bank):
    """Gated experts of several widths, taken in turn: with ``widths=[64, 16]`` every second one is narrow.

    The widest is ``d_expert``; without ``widths`` they are ``[d_expert, d_expert // 4]``. A router that sends
    a token to the big or to the small expert, or to none, decides how much is computed for it;
    ``random_path`` is one for learning that. Each expert's weights are stored in its own size and padded with
    zeros to be computed, which changes nothing.

    Shapes:
        ``x [N, D]`` to ``[N, D]``; parameters of the experts of width w, ``gate_up_w [e, 2w, D]`` and
        ``down_w [e, D, w]``: 3 D w numbers an expert.

    Raises:
        SettingError: ``widths`` has a width that is not in [1, ``d_expert``], or none that is ``d_expert``.

    Example:
        >>> bank = Unequal(LayerShape(d_model=4, d_expert=8, num_experts=4), widths=[8, 2])
        >>> sum(one.numel() for one in bank.parameters()), bank.matrices().down.shape
        (240, torch.Size([4, 4, 8]))

    Differences from the paper:
        There a layer has one big and one small part, and a bypass, which here is to choose no expert. The
        ratio of widths by default is ours.

    Reference:
        Duo-LLM: A Framework for Studying Adaptive Computation in Large Language Models (paper 138, abstract
        and a summary).
    """

    def __init__(self, shape: LayerShape, *, widths: list[int] | None = None, seed: int = 0) -> None:
        super().__init__(shape)
        self.widths = widths
        self.seed = seed
        turns = widths or [shape.d_expert, max(shape.d_expert // 4, 1)]
        if (
            any(not 1 <= width <= min(shape.d_expert, _MOST) for width in turns)
            or shape.d_expert not in turns
        ):
            raise SettingError(
                f"widths of Unequal must be in [1, {shape.d_expert}], one of them {shape.d_expert}, the "
                f"layer's d_expert; got {widths}"
            )
        self.by_expert = [turns[expert % len(turns)] for expert in range(shape.num_experts)]
        generator = begun(seed)
        for width in sorted(set(self.by_expert), reverse=True):
            count = self.by_expert.count(width)
            self.register_parameter(
                f"gate_up_{width}", drawn_matrices(generator, count, 2 * width, shape.d_model)
            )
            self.register_parameter(f"down_{width}", drawn_matrices(generator, count, shape.d_model, width))

    def num_used(self, num_chosen: float) -> float:
        # That of an expert of the mean width.
        held = sum(one.numel() for one in self.parameters())
        return held * num_chosen / self.shape.num_experts

    def matrices(self) -> Matrices:
        gate_up, down = [], []
        seen = dict.fromkeys(self.by_expert, 0)
        for width in self.by_expert:
            place, missing = seen[width], self.shape.d_expert - width
            seen[width] += 1
            gate, up = self.get_parameter(f"gate_up_{width}")[place].chunk(2)
            gate_up.append(torch.cat([F.pad(half, (0, 0, 0, missing)) for half in (gate, up)]))
            down.append(F.pad(self.get_parameter(f"down_{width}")[place], (0, missing)))
        return Matrices(torch.stack(gate_up), torch.stack(down), swiglu)
