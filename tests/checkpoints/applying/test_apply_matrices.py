"""Plans that store matrices outside the experts in fewer bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import tiny_inputs
from tiny_checkpoints import save_tiny

import mixtura
from mixtura.checkpoints.apply import apply_plan, planned_num_bytes
from mixtura.checkpoints.digest import checkpoint_digest
from mixtura.checkpoints.matrices import packable_matrices, rounded
from mixtura.checkpoints.skeleton import build, open_checkpoint
from mixtura.errors import UserError
from mixtura.kernels import PackedEmbedding, PackedLinear
from mixtura.methods import create
from mixtura.running.memory import account
from mixtura.running.stream import Streamed
from mixtura.types import Drop, Plan, Quantize, QuantizeMatrix

WAY = ("round_to_nearest", {"bits": 8})
# Routers of several kinds, tied embeddings, shared experts, biases, dense layers, a hybrid.
SOME = ("qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", "granitemoehybrid", "gemma4", "qwen2_moe", "glm4_moe")


def plan_of(source: Path, names: tuple[str, ...] | None = None) -> Plan:
    view = open_checkpoint(source)
    wanted = names or tuple(packable_matrices(build(view), view))
    return Plan(checkpoint_digest(source), tuple(QuantizeMatrix(name, *WAY) for name in wanted))


@pytest.fixture(params=SOME)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "source", request.param)


def test_what_is_written_runs_as_the_rounded_matrices(source: Path, tmp_path: Path) -> None:
    plan = plan_of(source)
    assert plan.matrices()
    out = apply_plan(plan, source, tmp_path / "out", progress=False)
    view, before = open_checkpoint(out), open_checkpoint(source)
    assert view.num_bytes == planned_num_bytes(plan, source) < before.num_bytes
    quantizer = create("quantizers", WAY[0], **WAY[1])
    expected = mixtura.load(source)
    for name in plan.matrices():
        assert torch.equal(view.parameter(name), rounded(before.tensor(name), quantizer))
        with torch.no_grad():
            expected.get_parameter(name).copy_(view.parameter(name))
    model = mixtura.load(out)
    inputs = tiny_inputs(model)
    with torch.no_grad():
        found, wanted = model(**inputs).logits, expected(**inputs).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    packed = [m for m in model.modules() if isinstance(m, PackedLinear | PackedEmbedding)]
    assert len(packed) >= len(plan.matrices())
    with pytest.raises(UserError, match="fewer bits"):
        model.save_pretrained(tmp_path / "saved")


def test_it_streams_as_it_runs_and_takes_what_is_accounted(source: Path, tmp_path: Path) -> None:
    out = apply_plan(plan_of(source), source, tmp_path / "out", progress=False)
    model = mixtura.load(out)
    ids = tiny_inputs(model)["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=ids).logits
    made = []
    Streamed(open_checkpoint(out)).run(ids, on_logits=lambda logits, _: made.append(logits))
    torch.testing.assert_close(torch.cat(made).view(whole.shape), whole, rtol=1e-4, atol=1e-5)
    held = sum(t.nbytes for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())
    assert account(out, 16).weights_bytes <= held
    assert account(out, 16).weights_bytes < account(source, 16).weights_bytes


def test_matrices_and_experts_in_one_plan(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")
    matrices = plan_of(source)
    actions = (Drop(0, (1,)), Quantize(1, 0, *WAY), *matrices.actions)
    out = apply_plan(Plan(matrices.source_digest, actions), source, tmp_path / "out", progress=False)
    model = mixtura.load(out)
    assert model.generate(torch.ones(1, 3, dtype=torch.int64), max_new_tokens=4).shape == (1, 7)
    assert "outside the experts" in (out / "README.md").read_text()


@pytest.mark.parametrize("name", ["lm_head.weigth", "model.layers.0.mlp.gate.weight", "model.norm.weight"])
def test_what_may_not_be_is_refused(tmp_path: Path, name: str) -> None:
    source = save_tiny(tmp_path / "source")
    with pytest.raises(UserError, match="no such matrix outside the experts"):
        apply_plan(plan_of(source, (name,)), source, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_quantizer_that_stores_rows_together_is_refused(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")
    plan = Plan(checkpoint_digest(source), (QuantizeMatrix("lm_head.weight", "trellis", {"bits": 3}),))
    with pytest.raises(UserError, match="read row by row"):
        apply_plan(plan, source, tmp_path / "out", progress=False)
