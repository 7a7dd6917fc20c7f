"""Adapters on experts that stay in fewer bits: the same as on the experts decoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapting.adapted_models import SETTINGS, error, gradients, logits, stir
from peft import get_peft_model
from tiny_plans import save_packed, save_source
from torch import nn

import mixtura
from mixtura.checkpoints.apply import apply_plan
from mixtura.checkpoints.digest import checkpoint_digest
from mixtura.checkpoints.matrices import packable_matrices
from mixtura.checkpoints.skeleton import build, open_checkpoint
from mixtura.checkpoints.view import open_model
from mixtura.errors import UserError
from mixtura.kernels import ExpertStore
from mixtura.types import Plan, QuantizeMatrix


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_packed(tmp_path_factory.mktemp("packed"), "qwen3_moe")


def loaded(folders: tuple[Path, Path]) -> Any:
    """The packed model in float32."""
    _, packed = folders
    return mixtura.load(packed, dtype=torch.float32)


def decoded(folders: tuple[Path, Path]) -> Any:
    """The same model with its experts decoded into plain parameters."""
    source, _ = folders
    model, stored = mixtura.load(source, dtype=torch.float32), loaded(folders)
    for plain, packed in zip(open_model(model).layers, open_model(stored).layers, strict=True):
        store: Any = packed.experts.mixtura_store
        assert isinstance(store, ExpertStore)
        for expert in range(plain.num_experts):
            for part, name in zip(
                store.get(expert, torch.float32)[:2], plain.expert_parameters, strict=False
            ):
                plain.tensor(name)[expert].copy_(part)
    return model


def with_adapter(model: Any, method: str, *, started: bool = True) -> Any:
    """The model under PEFT."""
    config = mixtura.AdapterConfig(method=method, settings=SETTINGS[method], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    if started:
        stir(adapted)
    return adapted.eval()


@pytest.mark.parametrize("method", ["expert_lora", "esft", "lora"])
def test_packed_experts_learn_like_decoded_ones(folders: tuple[Path, Path], method: str) -> None:
    base = logits(loaded(folders))
    packed = with_adapter(loaded(folders), method, started=False)
    # Whole compiled layers, which know of no adapters and run the model alone, round otherwise.
    assert error(logits(packed), base) < 1e-4
    stir(packed)
    plain = with_adapter(decoded(folders), method)
    assert error(logits(packed), logits(plain)) < 1e-4
    assert error(logits(packed), base) > 1e-3
    first, second = gradients(packed.train()), gradients(plain.train())
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert float((value - second[name]).abs().max()) < 2e-3 * float(value.abs().max()) + 1e-6, name


@pytest.fixture(scope="module")
def rest_packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and what it is with all matrices outside the experts in 8 bits."""
    place = tmp_path_factory.mktemp("rest")
    source = save_source(place / "source", "qwen3_moe")
    view = open_checkpoint(source)
    names = packable_matrices(build(view), view)
    actions = [QuantizeMatrix(name, "round_to_nearest", {"bits": 8}) for name in names]
    plan = Plan(checkpoint_digest(source), tuple(actions))
    return source, apply_plan(plan, source, place / "packed", progress=False)


@pytest.mark.parametrize("method", ["expert_lora", "lora"])
def test_other_matrices_in_fewer_bits_learn_like_decoded_ones(
    rest_packed: tuple[Path, Path], method: str
) -> None:
    source, folder = rest_packed
    plain = mixtura.load(source, dtype=torch.float32)
    view = open_checkpoint(folder)
    with torch.no_grad():
        for name in view.matrices:
            plain.get_parameter(name).copy_(view.parameter(name))
    packed = with_adapter(mixtura.load(folder, dtype=torch.float32), method)
    whole = with_adapter(plain, method)
    assert error(logits(packed), logits(whole)) < 1e-4
    first, second = gradients(packed.train()), gradients(whole.train())
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert float((value - second[name]).abs().max()) < 2e-3 * float(value.abs().max()) + 1e-6, name
    if method == "lora":
        with pytest.raises(UserError, match="fewer bits"):
            packed.merge_adapter()


def test_packed_experts_are_not_decoded_into_parameters(folders: tuple[Path, Path]) -> None:
    adapted = with_adapter(loaded(folders), "expert_lora")
    experts = [m for m in adapted.modules() if hasattr(m, "mixtura_store")]
    assert experts
    assert all(not isinstance(m, nn.Module) or not list(m.parameters()) for m in experts)


def test_nothing_is_merged_into_packed_experts(folders: tuple[Path, Path]) -> None:
    adapted = with_adapter(loaded(folders), "expert_lora")
    wanted = logits(adapted)
    with pytest.raises(UserError, match="stored in fewer bits and nothing can be merged"):
        adapted.merge_adapter()
    assert torch.equal(logits(adapted), wanted)


def test_dropout_is_refused_where_experts_run_twice(folders: tuple[Path, Path]) -> None:
    config = mixtura.AdapterConfig(method="expert_lora", settings={"rank": 2, "dropout": 0.1})
    adapted = get_peft_model(loaded(folders), config).train()
    ids = torch.arange(3, 12)[None]
    with pytest.raises(UserError, match="set the adapter's dropout to 0"):
        adapted(input_ids=ids, labels=ids)


def test_an_adapter_learned_on_packed_experts_fits_the_whole_ones(
    folders: tuple[Path, Path], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    from mixtura.running.adapters import with_adapter as put_on

    source, _ = folders
    with_adapter(loaded(folders), "expert_lora").save_pretrained(tmp_path)
    merged = put_on(mixtura.load(source, dtype=torch.float32), tmp_path).merge_and_unload()
    assert torch.isfinite(logits(merged)).all()
    assert not [w for w in recwarn if "other weights" in str(w.message)]
