"""Passing new tokens through evenly spaced layers only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

from mixtura.errors import UserError, check_range
from mixtura.methods.decoders import Branch, Decoder, Prompt, View

METHOD = {
    "paper": 174,
    "title": "Accelerating Inference in Large Language Models with a Unified Layer Skipping Strategy",
}


@final
class LayerSkipping(Decoder):
    """Unified layer skipping: new tokens pass the first and the last layer and evenly spaced ones between.

    About one in ``speedup`` layers is run, whatever the token, so that the time of a token is known
    beforehand. The prompt passes all layers. A model that was not trained with layers skipped gets worse, the
    more the more are skipped.

    Shapes:
        L layers to L / speedup.

    Raises:
        SettingError: ``speedup`` is not in [1, 1000].
        UserError: fewer than two layers would be left.

    Cost:
        One forward pass a token, of one row, through L / speedup layers: the others' weights, experts among
        them, are not read. Their places in the cache are filled with the keys and values of the nearest layer
        below.

    Example:
        >>> from mixtura.methods.decoders.layer_skipping import reserved
        >>> reserved(12, 2.0)
        (0, 2, 4, 6, 8, 11)

    Differences from the paper:
        Models are not fine-tuned with skipping here (2 epochs in the paper), which its quality rests on. The
        number of layers between, of which its code takes a whole part that may leave fewer layers than asked
        for, is as in the code.

    Reference:
        Accelerating Inference in Large Language Models with a Unified Layer Skipping Strategy (paper 174);
        its code, Adaxry/Unified_Layer_Skipping.
    """

    neutral: ClassVar[Mapping[str, Any]] = {"speedup": 1.0}

    def __init__(self, *, speedup: float = 1.5) -> None:
        check_range("LayerSkipping", "speedup", speedup, 1, 1000)
        self.speedup = speedup

    def open(self, prompt: Prompt) -> tuple[Branch, ...]:
        number = prompt.facts.num_layers
        if int(number / self.speedup) < 2:
            raise UserError(
                f"speedup of LayerSkipping must leave two of the {number} layers, got {self.speedup}; "
                f"give at most {number / 2:g}"
            )
        skipped = frozenset(range(number)) - frozenset(reserved(number, self.speedup))
        return (Branch(views=(View(skipped=skipped),)),)


def reserved(num_layers: int, speedup: float) -> tuple[int, ...]:
    """The layers that are run."""
    most = int(num_layers / speedup)
    interval = int(num_layers / (most - 1))
    found = {0, num_layers - 1}
    for layer in range(1, num_layers - 1):
        if layer % interval == 0 and len(found) < most:
            found.add(layer)
    return tuple(sorted(found))
