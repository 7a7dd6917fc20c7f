"""Which device of a cluster holds which expert: the records that planners, predictions and runs share.

The letter P counts devices. Devices are numbered node by node: device ``p`` lies in node
``p // devices_per_node``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, final

from mixtura.errors import SettingError, UnknownNameError, UserError, check_range

_VERSION = 1


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What connects two devices.

    Attributes:
        latency_s: seconds that a message takes whatever its size.
        bytes_per_s: bytes that one device sends over it in a second, while it receives as many.
    """

    latency_s: float
    bytes_per_s: float

    def __post_init__(self) -> None:
        check_range("Link", "latency_s", self.latency_s, 0, 60)
        check_range("Link", "bytes_per_s", self.bytes_per_s, 1, 1e18)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Devices alike, in nodes of as many each.

    Attributes:
        num_nodes: nodes.
        devices_per_node: devices of each.
        flops_per_s: floating-point operations a device does in a second at what is to run, not its peak.
        memory_num_bytes: memory of a device.
        within: between two devices of a node.
        between: between devices of two nodes.

    Raises:
        SettingError: a number is out of range.

    >>> fast, slow = Link(latency_s=1e-5, bytes_per_s=1e11), Link(latency_s=2e-5, bytes_per_s=1e10)
    >>> cluster = Cluster(num_nodes=2, devices_per_node=4, flops_per_s=1e14, memory_num_bytes=1 << 36,
    ...                   within=fast, between=slow)
    >>> cluster.num_devices, cluster.node(5)
    (8, 1)
    """

    num_nodes: int
    devices_per_node: int
    flops_per_s: float
    memory_num_bytes: int
    within: Link
    between: Link

    def __post_init__(self) -> None:
        for name, high in (("num_nodes", 1 << 16), ("devices_per_node", 1 << 12)):
            check_range("Cluster", name, getattr(self, name), 1, high)
        check_range("Cluster", "flops_per_s", self.flops_per_s, 1, 1e21)
        check_range("Cluster", "memory_num_bytes", self.memory_num_bytes, 1, 1 << 60)

    @property
    def num_devices(self) -> int:
        """P."""
        return self.num_nodes * self.devices_per_node

    def node(self, device: int) -> int:
        """The node of a device."""
        return device // self.devices_per_node

    def link(self, one: int, other: int) -> Link | None:
        """What connects two devices; None where they are one."""
        if one == other:
            return None
        return self.within if self.node(one) == self.node(other) else self.between


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlacement:
    """Where the experts of one layer lie.

    Attributes:
        index: number of the decoder layer.
        devices: by expert, the devices that run it. The first owns it: its numbers, gradients and optimizer
            states lie there; the others are given a copy for a step and give its gradients back.
        shares: by expert, what part of its assignments each of them is to run; empty for even parts.
        near: what comes from a device stays there if it can, then on its node; what is left goes by shares.
        parts: pieces that an expert's hidden features are cut into. Its devices then come in groups of so
            many, of which each holds one piece in order, and a group's outputs are added up.

    Raises:
        UserError: an expert lies nowhere or twice on one device, or shares or parts do not fit.
    """

    index: int
    devices: tuple[tuple[int, ...], ...]
    shares: tuple[tuple[float, ...], ...] = ()
    near: bool = False
    parts: int = 1

    def __post_init__(self) -> None:
        for expert, held in enumerate(self.devices):
            if not held or len(set(held)) != len(held) or min(held) < 0:
                raise UserError(
                    f"expert {expert} of layer {self.index} must lie on one or several different devices, "
                    f"got {list(held)}"
                )
            if self.parts < 1 or len(held) % self.parts:
                raise UserError(
                    f"expert {expert} of layer {self.index} is cut into {self.parts} parts, which its "
                    f"{len(held)} devices cannot share evenly"
                )
        if self.shares:
            self._check_shares()

    def _check_shares(self) -> None:
        if [len(one) for one in self.shares] != [len(one) // self.parts for one in self.devices]:
            raise UserError(
                f"layer {self.index} needs a share for each group of an expert's devices, got {self.shares}"
            )
        for expert, shares in enumerate(self.shares):
            if min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
                raise UserError(
                    f"the shares of expert {expert} of layer {self.index} must be positive and add up to 1, "
                    f"got {list(shares)}"
                )

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.devices)

    def owner(self, expert: int) -> int:
        """The device that an expert's numbers lie on; of one in parts, the first part's."""
        return self.devices[expert][0]

    def shares_of(self, expert: int) -> tuple[float, ...]:
        """What part of an expert's assignments each group of its devices runs."""
        groups = len(self.devices[expert]) // self.parts
        return self.shares[expert] if self.shares else (1 / groups,) * groups

    def held(self, num_devices: int) -> tuple[tuple[int, ...], ...]:
        """By device, the experts that lie on it, ascending."""
        found: list[list[int]] = [[] for _ in range(num_devices)]
        for expert, devices in enumerate(self.devices):
            for device in devices:
                found[device].append(expert)
        return tuple(map(tuple, found))


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceGroup:
    """Devices that share the sequences of a micro-batch, each token of which lies on one of them."""

    micro_batch: int
    devices: tuple[int, ...]
    sequences: tuple[int, ...]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where all experts of a model lie.

    Attributes:
        source_digest: of the model that it was planned for; empty where it is for any of these sizes.
        num_devices: P.
        devices_per_node: devices of a node.
        layers: one record for each layer with experts.
        groups: where sequences are split over devices, by whom.

    Raises:
        UserError: an expert lies on a device that is not there.
    """

    source_digest: str
    num_devices: int
    devices_per_node: int
    layers: tuple[LayerPlacement, ...]
    groups: tuple[SequenceGroup, ...] = ()

    def __post_init__(self) -> None:
        if self.num_devices < 1 or self.devices_per_node < 1 or self.num_devices % self.devices_per_node:
            raise UserError(
                f"{self.num_devices} devices cannot lie in nodes of {self.devices_per_node}; the number of "
                "devices must be a multiple of devices_per_node"
            )
        for layer in self.layers:
            last = max(map(max, layer.devices), default=0)
            if last >= self.num_devices:
                raise UserError(
                    f"layer {layer.index} has an expert on device {last}, but there are {self.num_devices} "
                    "devices, numbered from 0"
                )

    def layer(self, index: int) -> LayerPlacement:
        """The record of decoder layer ``index``.

        Raises:
            UserError: there is none.
        """
        for layer in self.layers:
            if layer.index == index:
                return layer
        raise UserError(
            f"this placement has no layer {index}; its layers are {[one.index for one in self.layers]}"
        )

    def to_json(self) -> str:
        """The placement as JSON text, the same bytes for the same placement.

        >>> layer = LayerPlacement(index=0, devices=((0,), (1, 0)))
        >>> made = Placement(source_digest="", num_devices=2, devices_per_node=2, layers=(layer,))
        >>> Placement.from_json(made.to_json()) == made
        True
        """
        return json.dumps({"mixtura_placement": _VERSION, **asdict(self)}, sort_keys=True) + "\n"

    @staticmethod
    def from_json(text: str) -> Placement:
        """Read what `to_json` wrote.

        Raises:
            UserError: the text is no placement of this version.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"this is no placement: {error}; `mixtura plan --save` writes one") from None
        if not isinstance(values, dict) or values.pop("mixtura_placement", None) != _VERSION:
            raise UserError(
                f"this is no placement of version {_VERSION}; write it with `mixtura plan --save`"
            )
        try:
            layers = tuple(LayerPlacement(**_tuples(one)) for one in values.pop("layers"))
            groups = tuple(SequenceGroup(**_tuples(one)) for one in values.pop("groups"))
            return Placement(**values, layers=layers, groups=groups)
        except (TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"this placement is damaged ({error}); write it with `mixtura plan --save`"
            ) from None


def cluster_from(values: Mapping[str, Any]) -> Cluster:
    """A cluster from plain values, as a file holds them.

    Raises:
        UnknownNameError: a key does not exist.
        SettingError: one is missing, of the wrong type or out of range.

    >>> link = {"latency_s": 1e-5, "bytes_per_s": 1e10}
    >>> made = cluster_from({"num_nodes": 1, "devices_per_node": 2, "flops_per_s": 1e12,
    ...                      "memory_num_bytes": 1 << 30, "within": link, "between": link})
    >>> made.num_devices
    2
    """
    links = {name: _record(Link, values[name], name) for name in ("within", "between") if name in values}
    made: Cluster = _record(Cluster, {**values, **links}, "the cluster")
    return made


def _record(cls: type[Any], values: Any, where: str) -> Any:
    known = [item.name for item in fields(cls)]
    if not isinstance(values, Mapping):
        raise SettingError(f"{where} must be a mapping with the keys {', '.join(known)}, got {values!r}")
    for key, value in values.items():
        if key not in known:
            raise UnknownNameError(f"key of {where}", str(key), known)
        whole = key.startswith(("num_", "devices_", "memory_"))
        wanted = "a whole number" if whole else "a number"
        kinds: tuple[type, ...] = (int, Link) if whole else (int, float, Link)
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise SettingError(f"{key} of {where} must be {wanted}, got {value!r}")
    missing = [name for name in known if name not in values]
    if missing:
        raise SettingError(f"{where} lacks {', '.join(missing)}; docs/scale.md explains every key")
    return cls(**values)


def _tuples(values: Any) -> dict[str, Any]:
    """Fields with tuples where JSON has lists."""

    def frozen(value: Any) -> Any:
        return tuple(map(frozen, value)) if isinstance(value, list) else value

    return {key: frozen(value) for key, value in values.items()}
