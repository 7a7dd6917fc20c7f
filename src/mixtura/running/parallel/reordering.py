"""A placement of equal counts as another order of a model's experts, which stock engines run as it is."""

from __future__ import annotations

from torch import Tensor, nn

from mixtura.checkpoints.viewing.droppable import cut
from mixtura.checkpoints.viewing.memory import MemoryView
from mixtura.errors import UserError
from mixtura.types.placement import LayerPlacement, Placement


def order_of(at: LayerPlacement, num_devices: int) -> tuple[int, ...]:
    """Experts in the order of their devices.

    >>> order_of(LayerPlacement(index=0, devices=((1,), (0,), (1,), (0,))), 2)
    (1, 3, 0, 2)

    Raises:
        UserError: an expert lies on several devices, or devices hold different numbers of them.
    """
    held = at.held(num_devices)
    if any(len(devices) != 1 for devices in at.devices) or len({len(one) for one in held}) != 1:
        raise UserError(
            f"layer {at.index} has experts on several devices, or not as many on each, which no order "
            "can say; run it with mixtura.parallelize, or choose a placement tagged equal_counts"
        )
    return tuple(expert for experts in held for expert in experts)


def reorder(model: nn.Module, placement: Placement) -> None:
    """Put a model's experts in an order in which consecutive ones are a device's, in place.

    Experts, rows of the router and biases of its choice move together, so the model computes what it did, and
    engines that lay consecutive experts on a device, such as transformers' own expert parallelism, follow
    the placement. What is saved afterwards is an ordinary checkpoint.

    Raises:
        UserError: the placement is no order of experts, is for another model, or mixes the groups that
            routers choose by.
    """
    layers = MemoryView(model).layers
    orders = {layer.index: order_of(placement.layer(layer.index), placement.num_devices) for layer in layers}
    for layer in layers:
        order = orders[layer.index]
        if len(order) != layer.num_experts:
            raise UserError(
                f"the placement has {len(order)} experts in layer {layer.index}, the model "
                f"{layer.num_experts}; plan for this model"
            )
        size = layer.num_experts // layer.num_groups
        if layer.num_groups > 1 and any(old // size != new // size for new, old in enumerate(order)):
            raise UserError(
                f"the router of layer {layer.index} chooses by {layer.num_groups} groups of neighbours, "
                "which this order would mix; choose the placement grouped, or mixtura.parallelize"
            )
    done: set[int] = set()
    for layer in layers:
        tensors = {**dict.fromkeys(layer.expert_parameters, 0), **layer.per_expert_tensors()}
        for name, axis in tensors.items():
            owner, _, leaf = name.rpartition(".")
            held: Tensor = getattr(model.get_submodule(owner), leaf)
            if id(held) not in done:
                done.add(id(held))
                held.data = cut(held.data, axis, orders[layer.index], layer.num_experts)
