"""Who takes part: every method of a kind with the settings that give it the same arithmetic, and baselines.

All models have the same attention, the same number of weights in experts and, as far as the method lets
itself be set, the same arithmetic a token. What a method uses in truth is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from mixtura.errors import UnknownNameError
from mixtura.methods import Header, header, names
from mixtura.train.arena.layers import attention_of, layer_of
from mixtura.train.arena.scale import Scale

KINDS = ("routers", "balancers", "mixers", "experts", "forms", "attentions")
REFERENCE = "top_k"
BALANCER: Mapping[str, Any] = {"name": "switch_loss", "coefficient": 0.01}

# Methods that send a token to one expert.
_ONE_EXPERT = frozenset(
    {
        "routers/base_layer", "routers/lr_moe", "routers/mixer_gate", "routers/smile", "routers/speech_moe2",
        "routers/stable_moe", "routers/switch", "routers/thor", "mixers/smear",
    }
)  # fmt: skip
_LAYERS: Mapping[str, Mapping[str, Any]] = {
    "routers/rex_moe": {"pool": 2},
    "routers/re_moe": {"balancers": ["re_moe_l1"]},
}
# Settings that bring a method to about the common number of experts a token.
_SETTINGS: Mapping[str, Callable[[Scale], Mapping[str, Any]]] = {
    "routers/ada_moe": lambda scale: {"num_null": scale.num_experts, "num_choices": 2 * scale.top_k},
    "routers/mask_moe": lambda scale: {"num_visible": 2 * scale.top_k, "num_choices": scale.top_k},
    "routers/mixture_of_depths": lambda scale: {"num_choices": 2 * scale.top_k},
    "routers/p_moe": lambda scale: {"patches": scale.share},
    "routers/pro_moe": lambda scale: {"per_token": scale.top_k},
    "mixers/soft_moe": lambda scale: {"slots": scale.share},
}
# Settings that count steps, as shares of the whole training.
_STEPS: Mapping[str, Mapping[str, float]] = {
    "routers/dense_to_sparse": {"num_steps": 0.6},
    "routers/rex_moe": {"start_step": 0.1, "end_step": 0.6},
    "routers/sigma_moe": {"switch_step": 0.5},
    "routers/stable_moe": {"stage_one_steps": 0.3},
}


@final
@dataclass(frozen=True, slots=True)
class Entry:
    """One model of the arena: its name, the fields of its configuration, and whether it is a baseline."""

    name: str
    model: Mapping[str, Any]
    baseline: bool = False
    tags: tuple[str, ...] = field(default=())

    @property
    def leaks(self) -> bool:
        """Whether a token's routing in evaluation depends on later tokens, which flatters the loss."""
        return "looks_ahead" in self.tags and "causal_inference" not in self.tags


def entries(
    kind: str, num_steps: int, only: Sequence[str] = (), scale: Scale | None = None
) -> tuple[Entry, ...]:
    """Baselines and methods of a kind; with ``only``, the named ones and the reference.

    Raises:
        UnknownNameError: a kind or name does not take part.
    """
    if kind not in KINDS:
        raise UnknownNameError("kind in the arena", kind, KINDS)
    scale = scale or Scale()
    found = {entry.name: entry for entry in _baselines(kind, scale)}
    for name in names(kind):
        found.setdefault(name, _method(header(kind, name), num_steps, scale))
    for name in only:
        if name not in found:
            raise UnknownNameError("entry in the arena", name, found)
    wanted = {*only, REFERENCE} if only else set(found)
    return tuple(entry for entry in found.values() if entry.name in wanted)


def plain_layer(scale: Scale) -> dict[str, Any]:
    """What a layer is made of besides its router or mixer, where the method does not say otherwise."""
    return {"num_experts": scale.num_experts, "d_expert": scale.d_expert, "balancers": [dict(BALANCER)]}


def _baselines(kind: str, scale: Scale) -> list[Entry]:
    widths = {"dense_active": scale.top_k * scale.d_expert, "dense_total": scale.num_experts * scale.d_expert}
    layers = ["dense"] * scale.num_hidden_layers
    dense = [
        Entry(name, {"intermediate_size": width, "layers": layers}, True) for name, width in widths.items()
    ]
    router = {"router": {"name": REFERENCE, "top_k": scale.top_k}}
    reference = Entry(REFERENCE, _moe(scale, router), True)
    if kind == "balancers":
        return [Entry("none", _moe(scale, router | {"balancers": []}), True), reference]
    plain = [_method(header("routers", name), 1, scale) for name in ("random", "hash")]
    others = [Entry(one.name, one.model, True, one.tags) for one in plain]
    return [*dense, *others, reference]


def _moe(scale: Scale, layer: Mapping[str, Any]) -> dict[str, Any]:
    return {"moe": plain_layer(scale) | dict(layer)}


def _method(found: Header, num_steps: int, scale: Scale) -> Entry:
    """A method as it takes part."""
    if found.kind == "attentions":
        plain = {"router": {"name": REFERENCE, "top_k": scale.top_k}}
        model = _moe(scale, plain) | attention_of(found.name, scale)
        return Entry(found.name, model, tags=found.tags)
    if found.kind in ("experts", "forms"):
        return Entry(found.name, _moe(scale, layer_of(found.kind, found.name, scale)), tags=found.tags)
    key = f"{found.kind}/{found.name}"
    settings: dict[str, Any] = {"name": found.name}
    if found.kind != "balancers" and any(setting.name == "top_k" for setting in found.settings):
        settings["top_k"] = scale.top_k
    if key in _SETTINGS:
        settings |= _SETTINGS[key](scale)
    settings |= {name: max(1, round(share * num_steps)) for name, share in _STEPS.get(key, {}).items()}
    layer = dict(_LAYERS.get(key, {})) | (dict(scale.wide) if key in _ONE_EXPERT else {})
    if found.kind == "mixers":
        # Every expert has every token: there is no load to even out.
        layer |= {"balancers": []}
    if found.kind != "balancers":
        chosen: dict[str, Any] = {found.kind.removesuffix("s"): settings}
        return Entry(found.name, _moe(scale, chosen | layer), tags=found.tags)
    needed = [tag.partition(":")[2] for tag in found.tags if tag.startswith("needs_router:")]
    router = {"name": needed[0]} if needed else {"name": REFERENCE, "top_k": scale.top_k}
    return Entry(found.name, _moe(scale, {"router": router, "balancers": [settings]}), tags=found.tags)
