"""All batches of a text through a streamed model at once: the same numbers, every weight read once."""

from __future__ import annotations

import threading
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_plans import save_source, uneven_drops
from torch import Tensor

from mixtura.checkpoints.skeleton import open_checkpoint
from mixtura.checkpoints.view import masked
from mixtura.data.tokens import TokenBatch
from mixtura.kernels import ExpertTensors
from mixtura.running.loading import load
from mixtura.running.observing.attach import attached
from mixtura.running.observing.passing import Wanted, observe_model, recording, trace_of
from mixtura.running.observing.recorder import Cursor
from mixtura.running.stream import Streamed
from mixtura.running.together import Forward, run_together

LENGTHS = torch.tensor([16, 9, 13, 4])
MASK = (torch.arange(16) < LENGTHS[:, None]).long()
TOKENS = TokenBatch(
    (torch.arange(64).view(4, 16) % 50 + 5) * MASK, MASK, torch.tensor([0, 1, 0, 1]), ("a", "b")
)
STATISTICS = ("weighted_output_norm", "output_norm_by_change", "top_logit")
FEATURES = ("mean_output", "logit_products")
FAMILIES = [
    "qwen3_moe",
    pytest.param("gpt_oss", marks=pytest.mark.slow),
    pytest.param("deepseek_v3", marks=pytest.mark.slow),
]


def one_by_one(number: int, call: int, forward: Forward, *given: Tensor) -> Tensor:
    """Run the experts as they are."""
    return forward(*given)


@pytest.mark.parametrize("family", FAMILIES)
def test_sees_what_a_model_in_memory_shows(family: str, tmp_path: Path) -> None:
    view = open_checkpoint(save_source(tmp_path / "source", family))
    streamed, cursor = Streamed(view), Cursor()
    wanted = Wanted(STATISTICS, FEATURES)
    with ExitStack() as stack:
        recorders, caught = stack.enter_context(recording(streamed.model, view.layers, cursor, 2, wanted))
        stack.enter_context(attached(streamed.model, {one.layer.name: one for one in recorders}, cursor))
        # One sequence a batch.
        run_together(streamed, TOKENS, cursor, one_by_one, caught=dict(enumerate(caught)), max_bytes=1)
    found = trace_of(streamed.model, TOKENS, recorders, "x", wanted)
    expected = observe_model(
        load(view.path), TOKENS, statistics=STATISTICS, features=FEATURES, progress=False, source_digest="x"
    )
    assert found.num_tokens == expected.num_tokens
    for mine, other in zip(found.layers, expected.layers, strict=True):
        assert torch.equal(mine.counts, other.counts)
        assert torch.equal(mine.coactivation, other.coactivation)
        assert (mine.transitions is None) == (other.transitions is None)
        if mine.transitions is not None:
            assert torch.equal(mine.transitions, other.transitions)
        for name, values in other.statistics.items():
            torch.testing.assert_close(mine.statistics[name], values, rtol=1e-4, atol=1e-6)
        for name, values in other.features.items():
            # Sums of many products, in another order: as near as the largest of them allows.
            scale = float(values.abs().max())
            torch.testing.assert_close(mine.features[name], values, rtol=1e-4, atol=1e-4 * scale)


def test_features_are_what_they_say(tmp_path: Path) -> None:
    model = load(save_source(tmp_path / "source", "qwen3_moe"))
    trace = observe_model(model, TOKENS, features=FEATURES, progress=False)
    block: Any = model.model.layers[0].mlp
    given: list[Tensor] = []
    handle = block.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    for ids, mask in zip(TOKENS.input_ids, TOKENS.attention_mask, strict=True):
        with torch.no_grad():
            model(input_ids=ids[mask.bool()][None], use_cache=False)
    handle.remove()
    rows = torch.cat([one.reshape(-1, one.shape[-1]) for one in given])
    with torch.no_grad():
        logits = (rows @ block.gate.weight.T).double()
    torch.testing.assert_close(
        trace.layers[0].feature("logit_products"), logits.T @ logits, rtol=1e-4, atol=1e-6
    )
    chosen = logits.topk(block.gate.top_k).indices
    for expert in range(logits.shape[1]):
        own = rows[(chosen == expert).any(-1)]
        once = torch.zeros(len(own), 1, dtype=torch.int64)
        with torch.no_grad():
            outputs = block.experts(own, once + expert, torch.ones(len(own), 1))
        mean = outputs.double().mean(0) if len(own) else torch.zeros(rows.shape[1], dtype=torch.float64)
        torch.testing.assert_close(trace.layers[0].feature("mean_output")[expert], mean, rtol=1e-4, atol=1e-6)


def test_every_expert_is_read_once_and_dropped_ones_never(tmp_path: Path) -> None:
    view = open_checkpoint(save_source(tmp_path / "source", "qwen3_moe"))
    drops = uneven_drops(view.path)
    reads: Counter[tuple[int, int]] = Counter()

    def instead(layer: int, expert: int, dtype: torch.dtype) -> ExpertTensors | None:
        reads[layer, expert] += 1
        return None

    streamed, cursor, made = Streamed(view, instead, dropped=drops), Cursor(), []

    def run_layer(number: int, call: int, forward: Forward, *given: Tensor) -> Tensor:
        made.append(forward(*given))
        return made[-1]

    run_together(streamed, TOKENS, cursor, run_layer, max_bytes=1)
    assert set(reads.values()) == {1}
    assert not {(layer, e) for layer, gone in drops.items() for e in gone} & set(reads)
    # Nothing of the model is left in memory, and it runs by itself as before.
    assert all(tensor.is_meta for tensor in streamed.model.state_dict().values())
    expected = load(view.path)
    outputs: list[Tensor] = []
    for layer in view.layers:
        expected.get_submodule(layer.name).register_forward_hook(lambda *a: outputs.append(a[2]))
    with masked(expected, drops), torch.no_grad():
        expected(input_ids=TOKENS.input_ids, attention_mask=MASK)
    for mine, other in zip(made, outputs, strict=True):
        valid = MASK.reshape(-1).bool()
        torch.testing.assert_close(mine[valid], other[valid], rtol=1e-4, atol=1e-5)


def test_an_error_ends_all_batches(tmp_path: Path) -> None:
    view = open_checkpoint(save_source(tmp_path / "source", "qwen3_moe"))
    streamed, before = Streamed(view), threading.active_count()

    def fail(number: int, call: int, forward: Forward, *given: Tensor) -> Tensor:
        if number:
            raise ZeroDivisionError("here")
        return forward(*given)

    with pytest.raises(ZeroDivisionError, match="here"):
        run_together(streamed, TOKENS, Cursor(), fail, max_bytes=1)
    assert threading.active_count() == before
    assert all(tensor.is_meta for tensor in streamed.model.state_dict().values())
    assert torch.isfinite(streamed.hidden(TOKENS.input_ids, MASK)).all()
