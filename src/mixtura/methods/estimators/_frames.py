"""Windows of frames, such as spectra of speech: convolutions over them, experts of single frames."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mixtura.errors import SettingError
from mixtura.methods.estimators._networks import Passed, perceptron, routed
from mixtura.types import Routing

Route = Callable[[Float[Tensor, "T D"], int, Tensor | None], Routing]


def channels_of(d_in: int, frames: int, owner: str) -> int:
    """Numbers of a frame in rows of so many.

    Raises:
        SettingError: they do not divide into frames.
    """
    if d_in % frames:
        raise SettingError(
            f"frames of {owner} must divide the {d_in} numbers of a row into windows, got {frames}"
        )
    return d_in // frames


def middle(each: Tensor, frames: int) -> Tensor:
    """Labels of windows as labels of their frames: the middle one has it, of the others none is known."""
    spread = torch.full((len(each), frames), -1)
    spread[:, frames // 2] = each
    return spread.flatten()


@final
class FrameNetwork(nn.Module):
    """Frames through convolutions and experts by turns; what is said is of the middle frame.

    Args:
        channels: numbers of a frame.
        d_out: outputs.
        owner: the estimator, with its sizes.
    """

    def __init__(self, channels: int, d_out: int, owner: Any) -> None:
        super().__init__()
        width, num = owner.d_model, owner.num_experts
        self.embed, self.head = nn.Linear(channels, width), nn.Linear(width, d_out)
        self.mixes = nn.ModuleList(nn.Conv1d(width, width, 3, padding=1) for _ in range(owner.num_layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(owner.num_layers))
        self.experts = nn.ModuleList(
            nn.ModuleList(perceptron(width, owner.d_hidden, width) for _ in range(num))
            for _ in range(owner.num_layers)
        )

    def forward(self, x: Float[Tensor, "n L C"], route: Route) -> tuple[Float[Tensor, "n O"], list[Routing]]:
        """Outputs, and the routing of all frames in each layer; ``route`` is told frames and the layer."""
        h, routings, state = self.embed(x), list[Routing](), None
        num_rows, num_frames, width = h.shape
        for layer, (mix, norm, experts) in enumerate(zip(self.mixes, self.norms, self.experts, strict=True)):
            h = h + mix(h.transpose(1, 2)).transpose(1, 2).relu()
            rows = norm(h).flatten(0, 1)
            assert isinstance(experts, nn.ModuleList)
            routing = route(rows, layer, state)
            state = routing.state
            h = h + routed(experts, rows, routing, width).reshape(num_rows, num_frames, width)
            routings.append(routing)
        return self.head(h[:, num_frames // 2].relu()), routings


def losses_of(routings: list[Routing]) -> Float[Tensor, ""]:
    """The routers' own losses, of all layers."""
    found = [loss for routing in routings for loss in routing.losses.values()]
    return torch.stack(found).sum() if found else torch.zeros((), dtype=torch.float64)


def labels_of(columns: Mapping[str, Int[Tensor, " n"]], frames: int, *, whole: bool) -> dict[str, Tensor]:
    """Labels of frames by name: of all frames of a window, or of its middle one."""
    return {
        name: each.repeat_interleave(frames) if whole else middle(each, frames)
        for name, each in columns.items()
    }


def said(output: Tensor, routings: list[Routing], more: Any = None) -> Passed:
    """What a network of frames puts out, with the last layer's routing."""
    return Passed(output=output, routing=routings[-1], more=routings if more is None else more)
