"""Every tag of every method means something that its kind says."""

from __future__ import annotations

import pytest

from mixtura.methods import Kind, header, kind, kinds, names


@pytest.mark.parametrize("one", kinds(), ids=lambda one: one.name)
def test_every_tag_is_explained(one: Kind) -> None:
    found = {(name, tag) for name in names(one.name) for tag in header(one.name, name).tags}
    assert not {(name, tag) for name, tag in found if one.explain(tag) is None}


def test_only_what_is_in_capitals_stands_for_any_name() -> None:
    analyses = kind("analyses")
    assert analyses.explain("statistic:output_norm")
    assert analyses.explain("needs:choices")
    assert analyses.explain("needs:choces") is None
    assert analyses.explain("statistic:") is None
