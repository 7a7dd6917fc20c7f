"""Observing: prices against an independent computation, cheaper prices, stopping and going on."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoints import save_tiny

from mixtura.checkpoints.skeleton import CheckpointView, open_checkpoint
from mixtura.checkpoints.tokenizer import load_tokenizer
from mixtura.checkpoints.viewing.disk import DiskLayer
from mixtura.fitting.calibration import Seen
from mixtura.fitting.clock import Clock
from mixtura.fitting.depth import Depth
from mixtura.fitting.journal import Journal, open_journal
from mixtura.fitting.observing import Observed, observed
from mixtura.fitting.palette import DROP, KEEP
from mixtura.fitting.pricing import LayerPricer
from mixtura.fitting.records import Request
from mixtura.fitting.rounding import rounder_for
from mixtura.fitting.texts import Texts, texts_of
from mixtura.running.observing import observe
from mixtura.running.stream import Streamed


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> CheckpointView:
    return open_checkpoint(save_tiny(tmp_path_factory.mktemp("observing") / "tiny"))


@pytest.fixture(scope="module")
def texts(view: CheckpointView) -> Texts:
    request = Request(model=view.path, out=Path("unused"), calibration_tokens=512, held_out_tokens=256)
    return texts_of(request, 64, load_tokenizer(view.path))


def run(view: CheckpointView, texts: Texts, directory: Path, depth: Depth | None = None, **rest) -> Observed:
    with open_journal(directory, {}) as journal:
        return observe_in(view, texts, journal, depth or Depth(), **rest)


def observe_in(
    view: CheckpointView, texts: Texts, journal: Journal, depth: Depth, limit_s: float = 1e6, notify=print
) -> Observed:
    clock, rounder = Clock(time.monotonic(), limit_s), rounder_for(view, journal)
    return observed(view, texts, depth, journal, rounder, clock=clock, notify=notify)


def test_importance_is_the_statistic_that_observing_takes(
    view: CheckpointView, texts: Texts, tmp_path: Path
) -> None:
    found = run(view, texts, tmp_path / "work")
    from mixtura.fitting.texts import as_batch

    streamed = Streamed(view)
    trace = observe(
        streamed.model,
        as_batch(texts.calibration),
        statistics=("weighted_output_norm",),
        layers=view.layers,
        batch_tokens=1 << 20,
    )
    expected = torch.cat([layer.statistic("weighted_output_norm") for layer in trace.layers]).numpy()
    assert np.allclose(found.importance, expected, rtol=1e-5)
    loads = torch.cat([layer.counts.sum(0) for layer in trace.layers]).numpy()
    assert (found.prices.load == loads).all()
    assert found.prices.weights is not None
    weights = torch.cat([layer.weight_sums.sum(0) for layer in trace.layers]).numpy()
    np.testing.assert_allclose(found.prices.weights, weights, rtol=1e-4)


def test_text_that_runs_in_several_parts_rounds_and_prices_as_at_once(
    view: CheckpointView, texts: Texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(view, texts, tmp_path / "whole")
    streamed = Streamed(view)
    length = max(part.input_ids.shape[1] for part in texts.calibration)
    rows = 2
    monkeypatch.setattr(
        "mixtura.fitting.observing.DEFAULT_WORKING_BYTES", rows * length * streamed.bytes_per_token(length)
    )
    parts = run(view, texts, tmp_path / "parts")
    layer = view.layers[0].index
    assert len([*(tmp_path / "parts").glob(f"inputs-{layer}-*")]) > 2
    assert (parts.prices.load == whole.prices.load).all()
    # Sums in another order, and now and then another code by them.
    ratio = parts.prices.errors[:, 1:] / whole.prices.errors[:, 1:]
    assert np.abs(np.median(ratio, 0) - 1).max() < 1e-3
    assert ((ratio > 0.8) & (ratio < 1.25)).mean() > 0.95


def test_padding_is_nothing_to_round_by(view: CheckpointView, tmp_path: Path) -> None:
    layer = view.layers[0]
    hidden = torch.randn(3, layer.shape.d_model, generator=torch.Generator().manual_seed(0))
    absent = layer.num_experts
    index = torch.tensor([[0, 1], [absent, absent], [2, absent]])
    with open_journal(tmp_path / "work", {}) as journal:
        pricer = LayerPricer(layer, rounder_for(view, journal))
        pricer.start(hidden, index, torch.ones(3, 2))
        assert pricer.num_tokens == 2
        (kept,) = (tmp_path / "work").glob("inputs-*")
        seen = Seen(**load_file(kept))
    torch.testing.assert_close(seen.average, hidden[[0, 2]].T @ hidden[[0, 2]] / 2)


def test_a_few_rounded_experts_price_the_others_about_as_rounding_them_does(
    view: CheckpointView, texts: Texts, tmp_path: Path
) -> None:
    full = run(view, texts, tmp_path / "full").prices
    few = run(view, texts, tmp_path / "few", Depth(None, None, 2)).prices
    assert (few.load == full.load).all()
    assert np.allclose(few.errors[:, DROP], full.errors[:, DROP])
    assert (few.errors[:, KEEP] == 0).all()
    used = full.load > 4
    ratio = few.errors[used, 1:DROP] / full.errors[used, 1:DROP]
    # Experts of a few rows differ a lot among themselves; that half of them are near is not by chance.
    assert np.median(np.abs(np.log(ratio))) < 0.35
    assert abs(np.log(ratio).mean()) < 0.25
    rounded = [e for layer in view.layers for e in range(layer.num_experts)]
    step = view.layers[0].num_experts // 2
    exact = np.array([e % step == 0 for e in rounded])
    assert np.allclose(few.errors[exact & used], full.errors[exact & used], rtol=0.05)


class _StoppedError(Exception):
    pass


def test_goes_on_at_the_layer_that_was_reached_to_the_same_bytes(
    view: CheckpointView, texts: Texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(view, texts, tmp_path / "whole")
    last = len(view.layers) - 1
    read: list[int] = []
    native_expert = DiskLayer.native_expert

    def stopping(layer: DiskLayer, expert: int):
        if layer.index == view.layers[last].index:
            raise _StoppedError
        return native_expert(layer, expert)

    monkeypatch.setattr(DiskLayer, "native_expert", stopping)
    with pytest.raises(_StoppedError):
        run(view, texts, tmp_path / "stopped")
    kept = sorted(path.name for path in (tmp_path / "stopped").glob("observed-*"))
    assert len(kept) == last

    def counting(layer: DiskLayer, expert: int):
        read.append(layer.index)
        return native_expert(layer, expert)

    monkeypatch.setattr(DiskLayer, "native_expert", counting)
    run(view, texts, tmp_path / "stopped")
    # Sizes are taken of the first expert of each layer; nothing else of the layers that were done is read.
    assert [read.count(layer.index) for layer in view.layers[:last]] == [1] * last
    assert read.count(view.layers[last].index) > 1
    prices = [(tmp_path / name / "prices.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert prices[0] == prices[1]
    assert not list((tmp_path / "stopped").glob("observed-*"))


def test_time_that_is_over_ends_it_after_a_layer_and_says_so(
    view: CheckpointView, texts: Texts, tmp_path: Path
) -> None:
    found = run(view, texts, tmp_path / "work", limit_s=0.0)
    assert found.num_unseen_layers == len(view.layers) - 1
    per_layer = view.layers[0].num_experts
    seen, unseen = found.prices.errors[:per_layer], found.prices.errors[per_layer:]
    assert np.allclose(unseen, seen.mean(0))
    assert (np.diff(unseen[:, 1:], axis=1) > 0).all()
