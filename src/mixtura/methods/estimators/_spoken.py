"""The network of frames whose domain and accent are told, with a first guess of each frame."""

from __future__ import annotations

from typing import Any, Final, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mixtura.errors import SettingError
from mixtura.methods.estimators._columns import NumberColumn
from mixtura.methods.estimators._frames import FrameNetwork, channels_of, labels_of, said
from mixtura.methods.estimators._networks import Passed, perceptron, router, told
from mixtura.types import Routing

# Numbers that domains and accents may have.
_MOST: Final = 16


@final
class SpokenNetwork(nn.Module):
    """Frames by experts that the sound, a first guess, the domain and the accent choose."""

    def __init__(self, d_in: int, d_out: int, owner: Any) -> None:
        super().__init__()
        places = owner.domain_column, owner.accent_column
        if d_in == len({*places} - {None}) or (places[0] is not None and places[0] == places[1]):
            raise SettingError(
                f"domain_column and accent_column of SpeechMoe2 must be two of {d_in} columns, beside "
                f"others, got {places[0]} and {places[1]}"
            )
        self.domain, self.accent = (
            NumberColumn(f"{what} of SpeechMoe2", place, d_in, -1, _MOST - 1)
            for what, place in zip(("domains", "accents"), places, strict=True)
        )
        self.kept = [column for column in range(d_in) if column not in places]
        self.frames = owner.frames
        channels = channels_of(len(self.kept), owner.frames, "SpeechMoe2")
        self.body = FrameNetwork(channels, d_out, owner)
        self.local = perceptron(channels, owner.d_hidden, d_out)
        how = {"vocab_size": d_out, "num_domains": _MOST, "num_accents": _MOST}
        losses = {"sparsity_coefficient": owner.sparsity, "importance_coefficient": owner.importance}
        seeds = range(owner.random_state, owner.random_state + owner.num_layers)
        self.gates = nn.ModuleList(
            router("speech_moe2", owner.d_model, owner.num_experts, seed, **how, **losses) for seed in seeds
        )

    def windows(self, x: Float[Tensor, "n D"]) -> Float[Tensor, "n L C"]:
        """The frames of rows, without the columns of numbers."""
        return x[:, self.kept].reshape(len(x), self.frames, -1)

    def forward(self, x: Float[Tensor, "n D"]) -> Passed:
        frames = self.windows(x)
        columns = {"domain": self.domain.numbers(x), "language": self.accent.numbers(x)}
        labels = labels_of(columns, self.frames, whole=True)
        with torch.no_grad():
            words = self.local(frames).argmax(-1).flatten()

        def route(rows: Tensor, layer: int, state: Tensor | None) -> Routing:
            more = {"labels": labels, "layer": layer, "token_ids": words}
            routing: Routing = self.gates[layer](told(rows, self.training, **more))
            return routing

        return said(*self.body(frames, route))
