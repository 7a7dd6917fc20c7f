"""A transformers model in memory as layers of a router and experts, read and written in place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mixtura.checkpoints.viewing.base import LayerView, ModelView
from mixtura.checkpoints.viewing.meta import build_meta, named_tensors
from mixtura.checkpoints.viewing.probe import CountField, Probe, probe
from mixtura.checkpoints.viewing.records import ExpertWeights, Site
from mixtura.checkpoints.viewing.refusals import refuse_without_experts
from mixtura.checkpoints.viewing.sites import find_sites
from mixtura.checkpoints.viewing.wrappers import experts_modules, is_elsewhere, plain_model, submodule
from mixtura.errors import UnsupportedModelError, UserError
from mixtura.kernels import ExpertTensors


@final
class MemoryLayer(LayerView):
    """One MoE layer of a model in memory. What it returns are views: writing to them writes the model."""

    def __init__(self, site: Site, model: nn.Module) -> None:
        super().__init__(site)
        self._model = model

    @property
    def experts(self) -> nn.Module:
        """The experts module."""
        return submodule(self._model, self.name)

    @property
    def router(self) -> nn.Module:
        """The router module."""
        return submodule(self._model, self.router_name)

    def tensor(self, name: str) -> Tensor:
        """One tensor of the model by its full name. Raises `LookupError` for a name it has not."""
        owner, _, leaf = name.rpartition(".")
        try:
            value = getattr(submodule(self._model, owner), leaf)
        except AttributeError:
            raise LookupError(f"the model has no tensor {name!r}") from None
        assert isinstance(value, Tensor)
        return value.detach()

    def native_expert(self, expert: int) -> ExpertTensors:
        """Expert ``expert`` in its family's own layout; see `LayerView.native_expert`."""
        self._check_expert(expert)
        store = getattr(self.experts, "mixtura_store", None)
        if store is not None:
            result = store.get(expert, store_dtype(self._model))
            assert isinstance(result, ExpertTensors)
            return result
        up, down, *biases = (self.tensor(name)[expert] for name in self.expert_parameters)
        return ExpertTensors(up, down, *(biases or (None, None)))

    def set_expert(self, expert: int, weights: ExpertWeights) -> None:
        """Write an expert, given in canonical orientation, into the model.

        Raises `UserError` where a tensor has another shape than the layer's or a bias is missing.
        """
        self._check_expert(expert)
        for part, value in weights.to_native(self.layout)._asdict().items():
            old = getattr(self.native_expert(expert), part)
            if (old is None) != (value is None) or (old is not None and old.shape != value.shape):
                raise UserError(
                    f"{part} of expert {expert} of layer {self.index} must have shape "
                    f"{None if old is None else list(old.shape)}, got "
                    f"{None if value is None else list(value.shape)}"
                )
            if old is not None:
                self._write(old, value)

    def set_router_weight(self, weight: Float[Tensor, "E D"]) -> None:
        """Write the router's rows."""
        self._write(self.router_weight(), weight)

    def set_correction_bias(self, bias: Float[Tensor, " E"]) -> None:
        """Write the selection bias. Raises `UserError` where the router has none."""
        held = self.correction_bias()
        if held is None:
            raise UserError(f"the router of layer {self.index} has no correction bias to set")
        self._write(held, bias)

    def _write(self, held: Tensor, value: Tensor) -> None:
        if is_elsewhere(held):
            raise UserError(
                f"the weights of layer {self.index} are offloaded or sharded, so that nothing can be written "
                "to them here; change the model before that"
            )
        held.copy_(value)


@final
class MemoryView(ModelView):
    """A model in memory, or the one inside what wraps it for adapters, compilation or several processes.

    The layers are found when they are first asked for; make a new view after changing modules.

    Raises:
        UnsupportedModelError: the model has no experts that mixtura knows, or they are sharded already.
        UserError: what was given holds several models.
    """

    def __init__(self, model: nn.Module) -> None:
        model = plain_model(model)
        if next(experts_modules(model), None) is None:
            refuse_without_experts(str(getattr(getattr(model, "config", None), "model_type", "?")))
        _require_shapes(model)
        self.model = model

    @property
    def config(self) -> Any:
        """The transformers config."""
        return self.model.config

    @cached_property
    def _probe(self) -> Probe:
        # Built anew: the model may have lost experts since it was made from its config.
        return probe(build_meta(type(self.model), self.config), self.config)

    @cached_property
    def layers(self) -> tuple[MemoryLayer, ...]:
        """The MoE layers, in order."""
        sites = find_sites(self.model, dict(self._probe.expert_axes))
        return tuple(MemoryLayer(site, self.model) for site in sites)

    @property
    def count_fields(self) -> Mapping[str, CountField]:
        """For each stack of MoE layers, the config field that sets its number of experts."""
        return self._probe.fields

    @property
    def stored_dtype(self) -> str:
        """The dtype of most of the experts' values."""
        counts = Counter(
            str(layer.tensor(name).dtype).removeprefix("torch.")
            for layer in self.layers
            for name in layer.expert_parameters
        )
        return counts.most_common(1)[0][0]

    @property
    def num_bytes(self) -> int:
        """Bytes of all parameters and buffers, tied ones once."""
        storages = {id(tensor): tensor.nbytes for tensor in named_tensors(self.model).values()}
        return sum(storages.values())


def _require_shapes(model: nn.Module) -> None:
    """Refuse a model whose parameters have been taken apart, so that nothing says where an expert is."""
    for name, experts in experts_modules(model):
        held = getattr(experts, "down_proj", None)
        if not isinstance(held, Tensor) or held.ndim != 3:
            raise UnsupportedModelError(
                f"the parameters of {name} are sharded over processes (FSDP, DeepSpeed ZeRO-3), so that its "
                "experts cannot be told apart; view the model, or change its routing, before it is sharded"
            )


def store_dtype(model: nn.Module) -> torch.dtype:
    """The dtype experts that are not plain parameters are read in: that of the model's first parameter."""
    return next(model.parameters()).dtype
