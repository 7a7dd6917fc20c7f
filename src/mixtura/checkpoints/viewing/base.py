"""What every view offers: a model as layers of a router and experts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mixtura.checkpoints.viewing.probe import CountField
from mixtura.checkpoints.viewing.records import ExpertLayout, ExpertWeights, Site
from mixtura.errors import CheckpointError, UserError
from mixtura.kernels import ExpertTensors
from mixtura.types import LayerShape


class LayerView(ABC):
    """One MoE layer: its sizes, its router and its experts.

    Names of tensors are the model's own (``model.layers.0.mlp.gate.weight``), also for a view of a
    checkpoint that stores them under other names.
    """

    def __init__(self, site: Site) -> None:
        self.site = site

    @property
    def index(self) -> int:
        """The decoder layer's number (further stacks, such as a talker's, are numbered after it)."""
        return self.site.index

    @property
    def stack(self) -> str:
        """The stack of layers this one belongs to: its name with the layer number as ``*``."""
        return self.site.stack

    @property
    def name(self) -> str:
        """Module path of the experts: ``model.layers.0.mlp.experts``."""
        return self.site.name

    @property
    def router_name(self) -> str:
        """Module path of the router: ``model.layers.0.mlp.gate``."""
        return self.site.router_name

    @property
    def block_name(self) -> str:
        """Module path of what holds router and experts: ``model.layers.0.mlp``."""
        return self.site.block_name

    @property
    def layout(self) -> ExpertLayout:
        """How the family stores its experts."""
        return self.site.layout

    @property
    def shape(self) -> LayerShape:
        """Sizes read from the tensors: ``d_model``, ``d_expert``, ``num_experts``."""
        return self.site.shape

    @property
    def num_experts(self) -> int:
        """E."""
        return self.shape.num_experts

    @property
    def top_k(self) -> int:
        """K, the experts each token chooses."""
        return self.site.top_k

    @property
    def num_groups(self) -> int:
        """Groups the experts form, of which a token may use `top_groups`; 1 where there is no limit."""
        return self.site.num_groups

    @property
    def top_groups(self) -> int:
        """Groups a token may choose experts from."""
        return self.site.top_groups

    @property
    def scoring(self) -> str:
        """How the router scores experts, for people: ``softmax``, ``sigmoid``, ``hash`` or another word."""
        return self.site.scoring

    @property
    def hash_routed(self) -> bool:
        """Whether a fixed table of token ids, not a learned score, chooses the experts."""
        return self.site.hash_routed

    @property
    def shared_experts(self) -> tuple[str, ...]:
        """Names of the tensors of experts that every token passes."""
        return self.site.shared_experts

    @property
    def expert_parameters(self) -> tuple[str, ...]:
        """Names of the tensors that hold the experts, stacked along axis 0."""
        return tuple(f"{self.name}.{parameter}" for parameter in self.layout.parameters)

    def per_expert_tensors(self) -> dict[str, int]:
        """Tensors outside the experts with one entry per expert, and the axis it is along.

        These are what must be cut when experts go: router rows, correction bias, per-expert scales.
        Entries after the first E (a skip class, shared experts' rows) always stay.
        """
        return dict(self.site.expert_axes)

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """One tensor of the model by its full name. Raises `LookupError` for a name it has not."""

    @abstractmethod
    def native_expert(self, expert: int) -> ExpertTensors:
        """Expert ``expert`` in its family's own layout and its stored dtype.

        Raises `UserError` for an expert that the layer does not have.
        """

    def expert(self, expert: int) -> ExpertWeights:
        """Expert ``expert`` in canonical orientation: ``gate[F, D]``, ``up[F, D]``, ``down[D, F]``."""
        return ExpertWeights.from_native(self.native_expert(expert), self.layout)

    def router_weight(self) -> Float[Tensor, "E D"]:
        """The router's rows, one per expert: of its last matrix where it has several."""
        return self.tensor(self.site.router_weight)[: self.num_experts]

    def correction_bias(self) -> Float[Tensor, " E"] | None:
        """The bias added to scores for selection only, or `None` where the router has none."""
        if self.site.correction_bias is None:
            return None
        return self.tensor(self.site.correction_bias).reshape(-1)[: self.num_experts]

    def check_finite(self, experts: Sequence[int] | None = None) -> None:
        """Raise `CheckpointError` if the router or an expert holds NaN or infinity.

        Reads every expert, or those in ``experts``, one at a time.
        """
        require_finite(self.site.router_weight, self.router_weight())
        for expert in range(self.num_experts) if experts is None else experts:
            for part, value in self.expert(expert).tensors().items():
                require_finite(f"{part} of expert {expert} of {self.name}", value)

    def _check_expert(self, expert: int) -> None:
        if not 0 <= expert < self.num_experts:
            raise UserError(
                f"layer {self.index} has experts 0 to {self.num_experts - 1}; there is no expert {expert}"
            )


class ModelView(ABC):
    """A model as its MoE layers. Get one from `mixtura.checkpoints.view.open_model`."""

    @property
    @abstractmethod
    def config(self) -> Any:
        """The transformers config."""

    @property
    @abstractmethod
    def layers(self) -> tuple[LayerView, ...]:
        """The MoE layers, in order; dense layers are not among them."""

    @property
    @abstractmethod
    def count_fields(self) -> Mapping[str, CountField]:
        """For each stack of MoE layers, the config field that sets its number of experts."""

    @property
    @abstractmethod
    def stored_dtype(self) -> str:
        """What most of the experts' values are stored as: ``bfloat16``, ``fp8``, ``mxfp4``, ..."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Bytes of all tensors as they are stored."""

    @property
    def stacks(self) -> tuple[str, ...]:
        """Module paths of what holds the decoder layers: ``model.layers``."""
        return tuple(dict.fromkeys(layer.stack.partition(".*")[0] for layer in self.layers))

    @property
    def model_type(self) -> str:
        """transformers' name of the family: ``qwen3_moe``."""
        return str(self.config.model_type)

    def layer(self, index: int) -> LayerView:
        """The MoE layer with this number. Raises `UserError` where that layer has no experts."""
        for layer in self.layers:
            if layer.index == index:
                return layer
        known = ", ".join(str(layer.index) for layer in self.layers)
        raise UserError(f"layer {index} has no experts; the layers with experts are {known}")


def require_finite(what: str, tensor: Tensor) -> None:
    """Raise `CheckpointError` where a tensor holds NaN or infinity, saying which one and how many."""
    bad = tensor.numel() - int(torch.isfinite(tensor).sum())
    if bad:
        raise CheckpointError(
            f"{what} holds {bad} values that are NaN or infinite of {tensor.numel()}; "
            "the checkpoint is damaged, download or write it again"
        )
