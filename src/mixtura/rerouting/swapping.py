"""Putting another router in the place of those of an ordinary transformers model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from mixtura.errors import UserError
from mixtura.kernels import register_backend
from mixtura.methods import create, declared_tags, load_method
from mixtura.methods.routers import Router
from mixtura.methods.settings import settings as settings_of
from mixtura.rerouting.core import Rerouting, require_layers
from mixtura.rerouting.saving import begin_saving
from mixtura.rerouting.seats import ROUTER, Seat
from mixtura.rerouting.side_files import Swap
from mixtura.rerouting.states import begin, require_each_suited

_BACKEND = "mixtura"
_NOT_GIVEN = {
    "attention": "attention of the layer before",
    "labels": "labels",
    "history": "what was routed before in decoding",
}


def set_router(
    model: nn.Module,
    router: str,
    /,
    *,
    layers: list[int] | None = None,
    train: bool = False,
    **settings: Any,
) -> Rerouting:
    """Put a router in place of those of an ordinary transformers MoE model.

    A router tagged ``keeps_weights`` uses the model's own router weights, live: training it trains them.
    Any other starts from random numbers and must be trained, which ``train=True`` acknowledges. The setting
    that says how many experts a token has (and the groups, where the method has them) is the model's own
    unless given. The experts run
    through mixtura's backend, in which tokens may have any number of experts. ``output_router_logits``,
    ``generate`` and training go on working; the router's own losses are added to the model's loss in
    training. ``save_pretrained`` writes the ordinary checkpoint and, beside it, ``router.json`` and
    ``router.safetensors``, which `load_router` reads.

    Args:
        model: of any family that `mixtura.open_model` knows.
        router: its name, or the path of its file.
        layers: decoder layers to change; by default all with experts.
        train: accept a router that has to be trained first.
        **settings: the router's own.

    Returns:
        What was changed; its ``callback`` counts a `Trainer`'s steps for routers that go by them.

    Raises:
        UnsupportedModelError: the model is dense or of a family that mixtura cannot work on.
        UnknownNameError: there is no such router.
        SettingError: a setting is unknown or out of range.
        UserError: the router needs what a transformers model cannot give it, must be trained, or does not
            suit the balancers that the model has already.
    """
    cls = load_method("routers", router)
    tags = declared_tags(cls)
    _refuse(cls, tags, train)
    rerouting = Rerouting.of(model)
    seats = require_layers(rerouting, layers)
    made = _made(router, cls, tags, seats, settings)
    balancers = next((s.balance.balancers for s in rerouting.seats.values() if s.balance is not None), ())
    require_each_suited(balancers, seats, cls)
    for seat, one in zip(seats, made, strict=True):
        if "keeps_weights" not in tags:
            _freeze_own(rerouting, seat)
        _install(seat, one, tags)
        if balancers:
            # What balancers have learned was of the router before.
            begin(seat, balancers)
    _run_experts_with_absent_choices(rerouting, seats)
    swap = Swap(router, settings, tuple(seat.layer.index for seat in seats))
    # One whose layers are all decided otherwise now is no more.
    rerouting.swaps = [old for old in rerouting.swaps if not set(old.layers) <= set(swap.layers)]
    rerouting.swaps.append(swap)
    begin_saving(rerouting)
    return rerouting


def _refuse(cls: type[Any], tags: frozenset[str], train: bool) -> None:
    """Raise `UserError` for a router that cannot do its work inside a transformers model."""
    for name, what in _NOT_GIVEN.items():
        if f"reads:{name}" in tags:
            raise UserError(
                f"{cls.__name__} reads {name}, and a transformers forward does not hand {what} to routers; "
                "choose a router without the tag reads:" + name
            )
    if tags & {"axes", "gates"}:
        raise UserError(
            f"{cls.__name__} chooses rows and columns of a grid of experts, whose scores are not those of "
            "single experts, as a transformers model needs them; choose another router"
        )
    if "modulates" in tags:
        raise UserError(
            f"{cls.__name__} changes what experts read, which routers of a transformers model have no part "
            "in; choose another router, or mixtura upcycle, which makes a model of mixtura's own"
        )
    if "two_passes" in tags:
        raise UserError(
            f"{cls.__name__} is trained on two passes over the same tokens, which a transformers model does "
            "not make; choose another router"
        )
    if "keeps_weights" not in tags and not train:
        raise UserError(
            f"{cls.__name__} cannot start from the model's router weights, so the model would not work "
            "before it is trained; pass train=True and train it"
        )


def _made(
    name: str, cls: type[Any], tags: frozenset[str], seats: list[Seat], settings: dict[str, Any]
) -> list[Router]:
    """A router for each seat; one for all where the method shares it."""
    known = settings_of(cls)
    made: list[Router] = []
    for seat in seats:
        layer = seat.layer
        own: dict[str, Any] = cls.settings_for(layer.top_k, layer.shape, settings)
        if "renormalize" in known and hasattr(seat.gate, "norm_topk_prob"):
            own |= {"renormalize": bool(seat.gate.norm_topk_prob)}
        if {"num_groups", "top_groups"} <= known.keys():
            own |= {"num_groups": layer.num_groups, "top_groups": layer.top_groups}
        if "shared" in tags:
            own |= {"num_layers": len(seats)}
        else:
            own |= {"seed": seat.place}
        filled = {key: value for key, value in own.items() if key in known} | settings
        augmented = int("keeps_weights" in tags and seat.bias is not None)
        shape = replace(layer.shape, d_model=seat.width + augmented)
        if made and "shared" in tags:
            if made[0].shape != shape:
                raise UserError(f"{cls.__name__} is shared by all layers, but layers differ in their sizes")
            made.append(made[0])
            continue
        made.append(create("routers", name, shape, **filled))
        made[-1].require_pool(1)
    return made


def _install(seat: Seat, router: Router, tags: frozenset[str]) -> None:
    if "keeps_weights" in tags:
        # Lent by the seat for each call, so that there is one matrix, the model's.
        router._parameters.pop("weight", None)
    router.to(device=seat.device)
    setattr(seat.gate, ROUTER, router)
    seat.keeps_correction = (
        "reads:selection_bias" in tags and seat.layer.scoring == "sigmoid" and seat.compares_sigmoids(router)
    )


def _freeze_own(rerouting: Rerouting, seat: Seat) -> None:
    """Weights that nothing uses now get no gradient, for which several processes would wait in vain."""
    for parameter in seat.gate.parameters():
        if parameter.requires_grad:
            parameter.requires_grad_(False)
            rerouting.undone.append(partial(parameter.requires_grad_, True))


def _run_experts_with_absent_choices(rerouting: Rerouting, seats: Iterable[Seat]) -> None:
    register_backend()
    for seat in seats:
        experts: Any = seat.layer.experts
        config = experts.config
        before = config._experts_implementation
        if before != _BACKEND:
            config._experts_implementation_internal = _BACKEND
            rerouting.undone.append(partial(_put_back, config, before))


def _put_back(config: Any, experts_implementation: str | None) -> None:
    config._experts_implementation_internal = experts_implementation
