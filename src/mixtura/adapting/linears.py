"""A linear layer of a model with adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

from torch import Tensor, nn
from torch.func import functional_call

from mixtura.adapting.changing import add_to_rows, added_rows, base_rows, changed_weight, changes_base
from mixtura.adapting.layers import AdapterLayer
from mixtura.errors import UserError
from mixtura.types import Change


@final
class LinearLayer(AdapterLayer):
    """A linear layer with adapters."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the layer makes of its input, with what adapters add for every token."""
        running = self.running if self.by_row is None else []
        bias = getattr(self.base_layer, "bias", None)
        if self.by_row is not None:
            return self._added_by_row(self.base_layer(x, *args, **kwargs), x, bias)
        changes = [self._change(name, x.reshape(-1, x.shape[-1])) for name in running]
        made: Tensor
        merged: list[Change] = []
        if self.merged_adapters and any(map(changes_base, changes)):
            # What is merged is none of the base's, which alone is scaled.
            merged = [self.adapter(name).change(self._none()) for name in self.merged_adapters]
            made = functional_call(self.base_layer, self._before, (x, *args), kwargs)
        else:
            made = self.base_layer(x, *args, **kwargs)
        made = base_rows(made, x, [*merged, *changes], bias)
        for change in merged:
            made = added_rows(made, x, change)
        for name, change in zip(running, changes, strict=True):
            made = self._with_losses(name, added_rows(made, x, change), change)
        return made

    def _added_by_row(self, made: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        wide, seen = made.reshape(-1, made.shape[-1]).clone(), x.reshape(-1, x.shape[-1])
        for name, rows in self.rows_of(seen.shape[0]).items():
            if name is not None:
                change = self._change(name, seen[rows])
                wide[rows] = add_to_rows(wide[rows], seen[rows], change, bias)
        return wide.view_as(made)

    def matrices(self) -> dict[str, Tensor]:
        weight = getattr(self.base_layer, "weight", None)
        return {"weight": weight.detach()} if isinstance(weight, nn.Parameter) else {}

    def held(self) -> dict[str, Tensor]:
        weight = getattr(self.base_layer, "weight", None)
        if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
            raise UserError(
                f"this {type(self.base_layer).__name__} is stored in fewer bits and nothing can be merged "
                "into it; use the adapter unmerged, or merge it into the model as it was before"
            )
        return {"weight": weight.data}

    def write(self, changes: Sequence[Change]) -> None:
        held = self.held()["weight"]
        held.copy_(changed_weight(held, *changes))
