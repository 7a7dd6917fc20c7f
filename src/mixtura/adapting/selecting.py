"""Which of several adapters a pass runs with, and texts with different ones side by side in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from mixtura.adapting.layers import AdapterLayer
from mixtura.checkpoints.viewing.wrappers import plain_model
from mixtura.errors import UnsupportedModelError
from mixtura.methods import declared_tags


def require_servable(model: nn.Module) -> None:
    """Refuse adapters that decide by whole prompts, which a server reads in parts and keeps beginnings of.

    Raises:
        UnsupportedModelError: names one.
    """
    for layer in (one for one in model.modules() if isinstance(one, AdapterLayer)):
        for name in layer.mixtura_adapter:
            if "per_prompt" in declared_tags(type(layer.adapter(name))):
                raise UnsupportedModelError(
                    f"the adapter {type(layer.adapter(name)).__name__} decides by the whole prompt, and a "
                    "server reads prompts in parts; use it by `mixtura generate --adapter`"
                )


def narrow(model: nn.Module, name: str) -> None:
    """Hold what an adapter has in place of the base's matrices in their dtype, in which it is multiplied.

    For training it is kept in float32; what runs takes no more memory than the base's own, to the same bit.
    """
    for layer in (one for one in model.modules() if isinstance(one, AdapterLayer)):
        held = next(layer.base_layer.parameters(), None)
        if name not in layer.mixtura_adapter or held is None or not held.is_floating_point():
            continue
        adapter = layer.adapter(name)
        if "trains_base" in declared_tags(type(adapter)):
            adapter.to(held.dtype)


@final
class Selection:
    """The adapters that were put on a model, and which of them its passes run with from now on.

    Args:
        adapted: a model under PEFT with all of its adapters, none merged.

    Attributes:
        names: of the adapters.
        mixes: whether each row of a pass can have an adapter of its own: all adapters are of the catalogue,
            none has whole modules of its own, and none is within what another changes.
    """

    def __init__(self, adapted: PeftModel) -> None:
        self.names = tuple(adapted.peft_config)
        modules = [*plain_model(adapted).modules()]
        self._layers = [one for one in modules if isinstance(one, BaseTunerLayer)]
        self._copies: list[Any] = [one for one in modules if isinstance(one, AuxiliaryTrainingWrapper)]
        ours: list[AdapterLayer] = [one for one in modules if isinstance(one, AdapterLayer)]
        nested = any(isinstance(below, AdapterLayer) for one in ours for below in one.base_layer.modules())
        self.mixes = len(ours) == len(self._layers) and not self._copies and not nested
        self._ours = ours if self.mixes else []
        self._now: object = ()

    def choose(self, names: Sequence[str | None]) -> None:
        """Run the next passes so: the adapter of each row, None for the model as it is.

        Rows of one adapter may be sequences of any length; where they differ, each is one token.

        Raises:
            ValueError: rows differ, and the adapters do not mix.
        """
        wanted = tuple(names)
        whole = len(set(wanted)) == 1
        if not whole and not self.mixes:
            raise ValueError(f"these adapters run one after the other, not {wanted} in one pass")
        key: object = wanted[0] if whole else wanted
        if key == self._now:
            return
        self._now = key
        for layer in self._ours:
            layer.by_row = None if whole else wanted
        if whole:
            self._choose_one(wanted[0])

    def _choose_one(self, name: str | None) -> None:
        for layer in self._layers:
            layer._disable_adapters = name is None
            if name is not None:
                layer._active_adapter = [name]
        for copy in self._copies:
            copy._disable_adapters = name is None
            # A module that this adapter has no copy of runs as it is.
            copy._active_adapter = [name] if name in copy._adapters else []
