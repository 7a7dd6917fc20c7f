"""Experts rounded once: what they are rounded by, what is kept, and what is written from it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_checkpoints import save_tiny
from torch import Tensor

from mixtura.checkpoints.apply import apply_plan
from mixtura.checkpoints.digest import checkpoint_digest
from mixtura.checkpoints.skeleton import CheckpointView, open_checkpoint
from mixtura.errors import CheckpointError
from mixtura.fitting.calibration import Seen
from mixtura.fitting.journal import Journal, open_journal
from mixtura.fitting.palette import STORED, quantizer_of
from mixtura.fitting.rounding import Rounder, rounder_for
from mixtura.kernels import ExpertTensors
from mixtura.types import Plan

# Experts in rows, and ones that lie transposed, with biases.
FAMILIES = ("qwen3_moe", "gpt_oss")
OPTION = next(option for option, way in STORED.items() if way.bits == 4)


@pytest.fixture(scope="module", params=FAMILIES)
def view(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CheckpointView:
    return open_checkpoint(save_tiny(tmp_path_factory.mktemp("rounding") / "tiny", request.param))


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with open_journal(tmp_path / "work", {}) as opened:
        yield opened


def seen_by(view: CheckpointView, seed: int = 0) -> Seen:
    """Tokens of a layer; its last expert is never chosen."""
    layer = view.layers[0]
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(90, layer.shape.d_model, generator=generator)
    index = torch.randint(0, layer.num_experts - 1, (90, layer.top_k), generator=generator)
    return Seen(hidden, index, torch.rand(90, layer.top_k, generator=generator))


def rounder_that_has_seen(view: CheckpointView, journal: Journal) -> tuple[Rounder, Seen]:
    rounder, seen = rounder_for(view, journal), seen_by(view)
    rounder.remember(view.layers[0].index, seen)
    return rounder, seen


def by_hand(view: CheckpointView, tensors: ExpertTensors, x: Tensor) -> Tensor:
    """The formula of the two families, written out."""
    if view.model_type == "qwen3_moe":
        gate, up = (x @ tensors.up.T).chunk(2, -1)
        return (torch.nn.functional.silu(gate) * up) @ tensors.down.T
    both = x @ tensors.up + tensors.up_bias
    gate, up = both[:, ::2].clamp(max=7.0), both[:, 1::2].clamp(-7.0, 7.0)
    return ((up + 1) * gate * torch.sigmoid(1.702 * gate)) @ tensors.down + tensors.down_bias


def test_errors_are_those_of_running_the_decoded_expert(view: CheckpointView, journal: Journal) -> None:
    rounder, seen = rounder_that_has_seen(view, journal)
    layer = view.layers[0]
    for expert in (0, 2):
        chosen = (seen.index == expert).nonzero()
        x = torch.stack([seen.hidden[token] for token, _ in chosen.tolist()])
        weights = torch.stack([seen.weights[token, place] for token, place in chosen.tolist()])
        before = by_hand(view, layer.native_expert(expert), x)
        after = by_hand(view, rounder.decoded(layer.index, expert, OPTION, torch.float32), x)
        error, whole = rounder.error(layer.index, expert, OPTION)
        assert error == pytest.approx(float((weights[:, None] * (after - before)).square().sum()), rel=1e-3)
        assert whole == pytest.approx(float((weights[:, None] * before).square().sum()), rel=1e-4)
        assert 0 < error < 0.2 * whole


def test_codes_heed_the_tokens_that_were_seen(view: CheckpointView, tmp_path: Path) -> None:
    layer, found = view.layers[0], []
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        with open_journal(tmp_path / name, {}) as journal:
            rounder = rounder_for(view, journal)
            rounder.remember(layer.index, seen_by(view, seed))
            found.append(rounder.decoded(layer.index, 0, OPTION, torch.float32).up)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_an_expert_that_no_token_chose_is_rounded_by_what_tokens_are_like(
    view: CheckpointView, journal: Journal
) -> None:
    rounder, _ = rounder_that_has_seen(view, journal)
    layer = view.layers[0]
    never = layer.num_experts - 1
    decoded = rounder.decoded(layer.index, never, OPTION, torch.float32)
    original = layer.native_expert(never)
    assert float((decoded.up - original.up).norm()) < 0.2 * float(original.up.norm())
    assert rounder.error(layer.index, never, OPTION) == (0.0, 0.0)
    plain = quantizer_of(OPTION)
    oriented = original.up.mT.contiguous() if layer.layout.transposed else original.up
    blind = plain.decode(plain.encode(oriented))
    assert not torch.equal(blind.mT if layer.layout.transposed else blind, decoded.up)


def test_nothing_is_rounded_twice(view: CheckpointView, journal: Journal) -> None:
    rounder, _ = rounder_that_has_seen(view, journal)
    layer = view.layers[0].index
    rounder.ensure(layer, {0: (OPTION,), 1: (OPTION,)})
    files = sorted(journal.path("rounded").rglob("*.safetensors"))
    times = [file.stat().st_mtime_ns for file in files]
    assert len(files) == 2
    # Another rounder, as of a fit that goes on.
    rounder_for(view, journal).ensure(layer, {0: (OPTION,), 1: (OPTION,)})
    assert [file.stat().st_mtime_ns for file in files] == times


def test_what_is_written_is_what_was_kept(view: CheckpointView, journal: Journal, tmp_path: Path) -> None:
    rounder, _ = rounder_that_has_seen(view, journal)
    layer = view.layers[0]
    rounder.ensure(layer.index, {0: (OPTION,)})
    # The second expert was not rounded before: it is now, without calibration.
    actions = tuple(STORED[OPTION].action(layer.index, expert) for expert in (0, 1))
    plan = Plan(checkpoint_digest(view.path), actions)
    out = apply_plan(plan, view.path, tmp_path / "out", progress=False, rounded=rounder.kept)
    written = open_checkpoint(out).layers[0]
    kept = rounder.decoded(layer.index, 0, OPTION, torch.float32)
    for name in ("up", "down", "up_bias", "down_bias"):
        mine, theirs = getattr(kept, name), getattr(written.native_expert(0), name)
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert torch.equal(theirs.float(), mine)
    quantizer = quantizer_of(OPTION)
    up = layer.native_expert(1).up
    blind = quantizer.decode(quantizer.encode(up.mT.contiguous() if layer.layout.transposed else up))
    assert torch.equal(written.native_expert(1).up, blind.mT if layer.layout.transposed else blind)


def test_a_damaged_file_is_refused_by_its_name(view: CheckpointView, journal: Journal) -> None:
    rounder, _ = rounder_that_has_seen(view, journal)
    layer = view.layers[0].index
    rounder.ensure(layer, {0: (OPTION,)})
    (file,) = journal.path("rounded").rglob("*.safetensors")
    save_file({"x": torch.zeros(3)}, str(file))
    with pytest.raises(CheckpointError, match="does not hold a rounded expert; remove it"):
        rounder.decoded(layer, 0, OPTION, torch.float32)
