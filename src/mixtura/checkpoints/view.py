"""Any transformers 5 MoE model, in memory or on disk without loading it, as routers and experts.

>>> from transformers import OlmoeConfig, OlmoeForCausalLM
>>> config = OlmoeConfig(
...     vocab_size=16, hidden_size=8, intermediate_size=4, num_hidden_layers=2,
...     num_attention_heads=2, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
...     pad_token_id=0, eos_token_id=1,
... )
>>> view = open_model(OlmoeForCausalLM(config))
>>> [layer.index for layer in view.layers], view.layers[0].shape
([0, 1], LayerShape(d_model=8, d_expert=4, num_experts=4))
>>> view.layers[0].expert(3).up.shape
torch.Size([4, 8])
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import overload

from torch import nn

from mixtura.checkpoints.packed import is_packed
from mixtura.checkpoints.viewing.base import LayerView, ModelView
from mixtura.checkpoints.viewing.disk import DiskLayer, DiskView
from mixtura.checkpoints.viewing.drop import drop_experts
from mixtura.checkpoints.viewing.mask import masked
from mixtura.checkpoints.viewing.memory import MemoryLayer, MemoryView
from mixtura.checkpoints.viewing.packed import PackedLayer, PackedView
from mixtura.checkpoints.viewing.probe import CountField
from mixtura.checkpoints.viewing.records import ExpertLayout, ExpertWeights, Site

__all__ = [
    "open_model",
    "ModelView",
    "LayerView",
    "MemoryView",
    "MemoryLayer",
    "DiskView",
    "DiskLayer",
    "PackedView",
    "PackedLayer",
    "ExpertLayout",
    "ExpertWeights",
    "Site",
    "CountField",
    "drop_experts",
    "masked",
]


@overload
def open_model(model: nn.Module) -> MemoryView: ...


@overload
def open_model(model: str | PathLike[str]) -> DiskView | PackedView: ...


def open_model(model: nn.Module | str | PathLike[str]) -> MemoryView | DiskView | PackedView:
    """View a model as layers of a router and experts.

    A path is a directory with ``config.json`` and safetensors files, ordinary or written by mixtura
    with experts in fewer bits; only headers are read.

    Raises `CheckpointError` for a directory that is missing, incomplete or damaged and
    `UnsupportedModelError` for a dense model, a family outside the common experts contract or a
    quantised format that is not read.
    """
    if isinstance(model, nn.Module):
        return MemoryView(model)
    return PackedView(model) if is_packed(Path(model)) else DiskView(model)
