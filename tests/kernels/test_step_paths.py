"""Which way each family's layers run on the release of transformers that is installed, and the reasons."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, tiny_model
from family_sizes import SIZES

from mixtura.kernels import isas, quicken, register_backend, using
from mixtura.kernels.paths import PATHS, LayerPath, paths_of

register_backend()
pytestmark = pytest.mark.skipif(not isas(), reason="the compiled kernels are missing")

# What docs/kernels.md says of families, in its order. Routers that choose among groups are made to have one.
WHOLE = (
    "aria", "mellum", "minimax_m2", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "dots1", "ernie4_5_moe",
    "exaone_moe", "glm4_moe", "solar_open",
)  # fmt: skip
BOTH = ("deepseek_ocr2", "glm4v_moe", "qwen3_omni_moe", "qwen3_vl_moe", "unlimited_ocr")
ATTENTION = ("hy_v3",)
EXPERTS = ("deepseek_v3", "flint", "glm4_moe_lite", "gpt_oss", "hunyuan_v1_moe", "mimo_v2_flash")
EXPECTED = {
    **dict.fromkeys(WHOLE, "whole step"),
    **dict.fromkeys(BOTH, "both halves"),
    **dict.fromkeys(ATTENTION, "attention half"),
    **dict.fromkeys(EXPERTS, "experts half"),
}
DOC = Path(__file__).parents[2] / "docs" / "kernels.md"


def quickened(family: str) -> Any:
    model: Any = tiny_model(family)
    model.set_experts_implementation("mixtura")
    quicken(model)
    return model


def moe_paths(model: Any, **named: Any) -> list[LayerPath]:
    """Of the layers that have experts."""
    return [
        path
        for path in paths_of(model, **named)
        if any(hasattr(module, "is_transposed") for module in model.get_submodule(path.layer).modules())
    ]


@pytest.mark.parametrize("family", EXPECTED)
def test_a_family_keeps_its_path(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if family not in FAMILIES:
        pytest.skip("this release has no such family")
    for name in ("n_group", "topk_group"):
        monkeypatch.setitem(SIZES, name, 1)
    found = moe_paths(quickened(family))
    assert found
    assert {path.path for path in found} == {EXPECTED[family]}, found


def test_the_documentation_names_these_families() -> None:
    page = DOC.read_text(encoding="utf-8")
    text = page.partition("Of the families with experts")[2].partition("The others")[0]
    named = [name for name in re.findall(r"\b[a-z][a-z0-9_]*\b", text) if name in EXPECTED]
    assert named == list(EXPECTED)


def test_every_layer_has_a_path_and_all_but_the_fastest_a_reason() -> None:
    for family in ("qwen3_moe", "gpt_oss", "phimoe", "gemma4"):
        for path in paths_of(quickened(family)):
            assert path.path in PATHS
            assert bool(path.reason) == (path.path != "whole step"), path


def reasons(model: Any) -> set[tuple[str, str]]:
    return {(path.path, path.reason) for path in paths_of(model)}


def test_the_reason_is_the_one_there_is() -> None:
    model = quickened("qwen3_moe")
    assert reasons(model) == {("whole step", "")}
    with using("torch"):
        assert reasons(model) == {("PyTorch", "the kernels' mode is 'torch'")}
    with using("exact"):
        assert reasons(model) == {("experts", "the kernels' mode is 'exact'")}
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    found = paths_of(model)
    assert [path.path for path in found] == ["both halves", "experts", "both halves"]
    assert all("looks on" in path.reason for path in found)
    handle.remove()
    assert reasons(model) == {("whole step", "")}
    model.set_experts_implementation("eager")
    assert {path.path for path in paths_of(model)} == {"attention half"}
    assert all("'eager'" in path.reason for path in paths_of(model))
    model.set_experts_implementation("mixtura")
    model.set_attn_implementation("flex_attention")
    with torch.no_grad():
        found = paths_of(model, probe=False)
    assert {path.path for path in found} != {"whole step"}
    model.set_attn_implementation("sdpa")
    model.config.output_router_logits = True
    assert all("output_router_logits" in reason for _, reason in reasons(model))


def test_a_model_that_was_not_quickened_is_told_so() -> None:
    model: Any = tiny_model("olmoe")
    model.set_experts_implementation("mixtura")
    assert {path.path for path in paths_of(model)} == {"experts"}
    assert all("quicken" in path.reason for path in paths_of(model))


def test_without_a_probe_nothing_runs() -> None:
    model = quickened("olmoe")
    seen: list[object] = []
    model.register_forward_pre_hook(lambda *given: seen.append(given))
    assert {path.reason for path in paths_of(model, probe=False)} == {"it has not run yet"}
    assert not seen
    twin = copy.deepcopy(model)
    paths_of(model)
    assert {path.path for path in paths_of(model, probe=False)} == {"whole step"}
    assert {path.path for path in paths_of(twin, probe=False)} == {"experts"}
