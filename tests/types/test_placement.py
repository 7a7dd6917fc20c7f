"""Records of clusters and placements: what they refuse, and JSON both ways."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mixtura.errors import SettingError, UnknownNameError, UserError
from mixtura.types.placement import LayerPlacement, Placement, SequenceGroup, cluster_from

LINK = {"latency_s": 1e-5, "bytes_per_s": 1e10}
CLUSTER: dict[str, Any] = {
    "num_nodes": 2,
    "devices_per_node": 2,
    "flops_per_s": 1e12,
    "memory_num_bytes": 1 << 30,
    "within": LINK,
    "between": LINK,
}


def made(**more: Any) -> Placement:
    layer = LayerPlacement(index=3, devices=((0,), (1, 2)), shares=((1.0,), (0.25, 0.75)), near=True)
    group = SequenceGroup(micro_batch=0, devices=(0, 1), sequences=(4,))
    return Placement(
        source_digest="x", num_devices=4, devices_per_node=2, layers=(layer,), groups=(group,), **more
    )


def test_json_both_ways() -> None:
    assert Placement.from_json(made().to_json()) == made()


@pytest.mark.parametrize(
    ("devices", "more", "message"),
    [
        (((),), {}, "expert 0 of layer 1 must lie on one or several different devices"),
        (((0,), (1, 1)), {}, r"expert 1 of layer 1 must lie .* got \[1, 1\]"),
        (((0, 1, 2),), {"parts": 2}, "cut into 2 parts, which its 3 devices cannot share"),
        (((0, 1),), {"shares": ((0.5, 0.6),)}, "must be positive and add up to 1"),
        (((0, 1),), {"shares": ((1.0,),)}, "needs a share for each group"),
    ],
)
def test_layers_that_make_no_sense_are_refused(devices: Any, more: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        LayerPlacement(index=1, devices=devices, **more)


def test_a_device_that_is_not_there_is_refused() -> None:
    layer = LayerPlacement(index=0, devices=((4,),))
    with pytest.raises(UserError, match="an expert on device 4, but there are 4 devices"):
        Placement(source_digest="", num_devices=4, devices_per_node=2, layers=(layer,))
    with pytest.raises(UserError, match="4 devices cannot lie in nodes of 3"):
        Placement(source_digest="", num_devices=4, devices_per_node=3, layers=())
    with pytest.raises(UserError, match=r"no layer 2; its layers are \[3\]"):
        made().layer(2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_node": 2}, "no key of the cluster named 'num_node'; did you mean 'num_nodes'"),
        ({"num_nodes": 2.5}, "num_nodes of the cluster must be a whole number, got 2.5"),
        ({"num_nodes": 0}, r"num_nodes of Cluster must be in \[1, 65536\], got 0"),
        ({"within": 3}, "within must be a mapping with the keys latency_s, bytes_per_s"),
        ({"within": {"latency_s": 1}}, "within lacks bytes_per_s"),
        ({"flops_per_s": True}, "flops_per_s of the cluster must be a number"),
    ],
)
def test_a_cluster_that_makes_no_sense_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises((SettingError, UnknownNameError), match=message):
        cluster_from(CLUSTER | change)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"mixtura_placement": 1}', '{"mixtura_placement": 2}'])
def test_what_is_no_placement_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="mixtura plan --save"):
        Placement.from_json(text)


def test_a_damaged_placement_is_refused() -> None:
    values = json.loads(made().to_json())
    values["layers"][0]["colour"] = "red"
    with pytest.raises(UserError, match="this placement is damaged"):
        Placement.from_json(json.dumps(values))
