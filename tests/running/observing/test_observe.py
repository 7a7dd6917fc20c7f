"""Observing: the trace is what forward hooks and brute force say, and the model is left as it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from recording import Seen, expert_output, record, text
from torch import Tensor, nn

from mixtura.checkpoints.view import open_model
from mixtura.data.tokens import TokenBatch
from mixtura.errors import CheckpointError, UnknownNameError, UnsupportedModelError, UserError
from mixtura.running.observing import observe
from mixtura.running.observing.attach import attached
from mixtura.running.observing.recorder import Cursor
from mixtura.types.trace import Trace

FAMILIES = ("qwen3_moe", "deepseek_v3", "gpt_oss", "mixtral")
TEXT = text([9, 4, 12, 1, 7], [0, 1, 0, 2, 1])

MAXIMUM = '''"""Largest output norm, for a test."""

from typing import final

import torch

from mixtura.methods.statistics import Statistic

METHOD = {"paper": None, "title": "test", "tags": [], "gaps": {}}


@final
class MaxOutputNorm(Statistic):
    """Norm of the output."""

    def measure(self, inputs, outputs, weights):
        return torch.linalg.vector_norm(outputs, dim=-1)
'''


def counted(seen: list[Seen], num_domains: int, num_experts: int) -> tuple[Tensor, Tensor]:
    counts = torch.zeros((num_domains, num_experts), dtype=torch.int64)
    sums = torch.zeros((num_domains, num_experts), dtype=torch.float64)
    for token in seen:
        for expert, weight in zip(token.experts, token.weights, strict=True):
            if 0 <= expert < num_experts:
                counts[token.domain, expert] += 1
                sums[token.domain, expert] += weight
    return counts, sums


def paired(first: list[Seen], second: list[Seen], size: tuple[int, int]) -> Tensor:
    table = torch.zeros(size, dtype=torch.int64)
    for one, other in zip(first, second, strict=True):
        for i in one.experts:
            for j in other.experts:
                if 0 <= i < size[0] and 0 <= j < size[1]:
                    table[i, j] += 1
    return table


def assert_same(one: Trace, other: Trace, rtol: float = 1e-4) -> None:
    """Equal counts, close sums; what depends on the order of sequences is not compared."""
    assert one.num_tokens == other.num_tokens
    for a, b in zip(one.layers, other.layers, strict=True):
        assert torch.equal(a.counts, b.counts)
        assert torch.equal(a.coactivation, b.coactivation)
        assert (a.transitions is None) == (b.transitions is None)
        if a.transitions is not None:
            assert torch.equal(a.transitions, b.transitions)
        torch.testing.assert_close(a.weight_sums, b.weight_sums, rtol=rtol, atol=1e-6)
        assert set(a.statistics) == set(b.statistics)
        for name in a.statistics:
            torch.testing.assert_close(a.statistics[name], b.statistics[name], rtol=rtol, atol=1e-6)


def check_against_hooks(model: nn.Module, tokens: TokenBatch) -> None:
    seen = record(model, tokens)
    trace = observe(model, tokens, keep_choices=True, batch_tokens=24)
    layers = open_model(model).layers
    assert [layer.index for layer in trace.layers] == [layer.index for layer in layers]
    for number, (found, layer) in enumerate(zip(trace.layers, layers, strict=True)):
        num_experts = layer.shape.num_experts
        counts, sums = counted(seen[layer.name], len(tokens.domain_names), num_experts)
        assert torch.equal(found.counts, counts)
        torch.testing.assert_close(found.weight_sums, sums, rtol=1e-4, atol=1e-5)
        here = seen[layer.name]
        assert torch.equal(found.coactivation, paired(here, here, (num_experts, num_experts)))
        if number + 1 < len(layers):
            after = layers[number + 1]
            pairs = paired(here, seen[after.name], (num_experts, after.shape.num_experts))
            assert torch.equal(found.transitions, pairs)
        else:
            assert found.transitions is None
        chosen = [sorted(min(e, num_experts) for e in token.experts) for token in here]
        assert found.choices.sort(dim=1).values.tolist() == chosen


@pytest.mark.parametrize("family", FAMILIES)
def test_trace_is_what_forward_hooks_see(family: str) -> None:
    check_against_hooks(tiny_model(family), TEXT)


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_equal_brute_force(family: str, tmp_path: Path) -> None:
    (tmp_path / "max_output_norm.py").write_text(MAXIMUM)
    model = tiny_model(family)
    names = ["output_norm", "weighted_output_norm", str(tmp_path / "max_output_norm.py")]
    trace = observe(model, TEXT, statistics=names, batch_tokens=24)
    seen = record(model, TEXT)
    for found, layer in zip(trace.layers, open_model(model).layers, strict=True):
        experts = model.get_submodule(layer.name)
        shape = found.counts.shape
        norms: dict[str, Tensor] = {
            name: torch.zeros(shape, dtype=torch.float64) for name in ("plain", "weighted", "largest")
        }
        for token in seen[layer.name]:
            for expert, weight in zip(token.experts, token.weights, strict=True):
                norm = expert_output(experts, token.hidden, expert).norm().item()
                norms["plain"][token.domain, expert] += norm
                norms["weighted"][token.domain, expert] += weight * norm
                cell = norms["largest"][token.domain, expert]
                norms["largest"][token.domain, expert] = max(cell.item(), norm)
        times = found.counts.clamp(min=1)
        expected = {
            "output_norm": norms["plain"] / times,
            "weighted_output_norm": norms["weighted"] / times,
            "max_output_norm": norms["largest"],
        }
        assert set(found.statistics) == set(expected)
        for name, values in expected.items():
            torch.testing.assert_close(found.statistics[name], values, rtol=1e-4, atol=1e-6)


def test_domains_are_counted_apart_and_tokens_by_domain() -> None:
    trace = observe(tiny_model("qwen3_moe"), TEXT)
    assert trace.domains == ("domain0", "domain1", "domain2")
    assert trace.num_tokens == (21, 11, 1)
    for layer in trace.layers:
        assert layer.counts.sum(1).tolist() == [tokens * layer.top_k for tokens in trace.num_tokens]


def test_padding_changes_nothing() -> None:
    model = tiny_model("deepseek_v3")
    alone = observe(model, TEXT, statistics=["output_norm"], batch_tokens=1)
    together = observe(model, TEXT, statistics=["output_norm"], batch_tokens=1000)
    assert_same(alone, together)
    left = replace(TEXT, input_ids=TEXT.input_ids.flip(1), attention_mask=TEXT.attention_mask.flip(1))
    lengths = TEXT.attention_mask.sum(1)
    for row, length in enumerate(lengths.tolist()):
        left.input_ids[row, left.input_ids.shape[1] - length :] = TEXT.input_ids[row, :length]
    assert_same(alone, observe(model, left, statistics=["output_norm"]))
    wide = torch.nn.functional.pad
    wider = replace(
        TEXT,
        input_ids=wide(TEXT.input_ids, (3, 5, 0, 2), value=1),
        attention_mask=wide(TEXT.attention_mask, (3, 5, 0, 2)),
        domains=wide(TEXT.domains, (0, 2)),
    )
    assert_same(alone, observe(model, wider, statistics=["output_norm"]))


@torch.no_grad()
def test_outputs_of_real_tokens_are_unchanged_and_padding_runs_no_expert() -> None:
    model = tiny_model("gpt_oss")
    plain = model(input_ids=TEXT.input_ids, attention_mask=TEXT.attention_mask, use_cache=False).logits
    rows: list[int] = []

    class Counter:
        def start(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> None:
            absent = ~TEXT.attention_mask.bool().reshape(-1)
            assert bool((top_k_index[absent] == 8).all())
            assert not top_k_weights[absent].any()

        def expert(
            self, expert: int, token_ids: Tensor, weights: Tensor, inputs: Tensor, outputs: Tensor
        ) -> None:
            rows.append(token_ids.numel())

        def finish(self) -> None:
            pass

    layers = open_model(model).layers
    cursor = Cursor()
    valid = TEXT.attention_mask.bool()
    cursor.move(valid.reshape(-1), torch.zeros(valid.numel(), dtype=torch.int64))
    with attached(model, {layer.name: Counter() for layer in layers}, cursor):
        watched = model(input_ids=TEXT.input_ids, attention_mask=TEXT.attention_mask, use_cache=False).logits
    torch.testing.assert_close(watched[valid], plain[valid], rtol=1e-4, atol=1e-5)
    assert sum(rows) == TEXT.num_tokens * sum(layer.top_k for layer in layers)


def test_extra_observers_see_the_same_pass() -> None:
    model = tiny_model("mixtral")
    seen: dict[int, list[int]] = {}

    class Watch:
        def __init__(self, index: int) -> None:
            self.counts = seen.setdefault(index, [0] * 8)

        def start(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> None:
            pass

        def expert(
            self, expert: int, token_ids: Tensor, weights: Tensor, inputs: Tensor, outputs: Tensor
        ) -> None:
            assert inputs.shape == outputs.shape == (token_ids.numel(), 32)
            self.counts[expert] += token_ids.numel()

        def finish(self) -> None:
            pass

    trace = observe(model, TEXT, observers=lambda layer: Watch(layer.index) if layer.index != 1 else None)
    assert set(seen) == {layer.index for layer in trace.layers if layer.index != 1}
    for index, counts in seen.items():
        assert trace.layer(index).load.tolist() == counts


def snapshot(model: Any) -> dict[str, Any]:
    modules = dict(model.named_modules())
    return {
        "training": {name: module.training for name, module in modules.items()},
        "attributes": {name: sorted(module.__dict__) for name, module in modules.items()},
        "hooks": {name: len(module._forward_pre_hooks) for name, module in modules.items()},
        "implementation": model.config._experts_implementation,
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
    }


class Stop:
    """An observer that ends the pass in the middle."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def start(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> None:
        pass

    def expert(
        self, expert: int, token_ids: Tensor, weights: Tensor, inputs: Tensor, outputs: Tensor
    ) -> None:
        raise self.error

    def finish(self) -> None:
        pass


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_model_is_left_as_it_was(error: type[BaseException] | None) -> None:
    model = tiny_model("qwen3_moe")
    model.train()
    model.lm_head.eval()
    before = snapshot(model)
    if error is None:
        observe(model, TEXT)
    else:
        with pytest.raises(error):
            observe(model, TEXT, observers=lambda layer: Stop(error) if layer.index else None)
    after = snapshot(model)
    weights, kept = before.pop("weights"), after.pop("weights")
    assert before == after
    assert all(torch.equal(weights[name], kept[name]) for name in weights)


def test_an_observer_that_was_there_is_put_back() -> None:
    model = tiny_model("qwen3_moe")
    experts: Any = model.get_submodule(open_model(model).layers[0].name)
    mine = Stop(RuntimeError)
    experts.mixtura_observer = mine
    observe(model, TEXT)
    assert experts.mixtura_observer is mine


def test_trace_saves_and_loads(tmp_path: Path) -> None:
    trace = observe(tiny_model("mixtral"), TEXT, statistics=["output_norm"], keep_choices=True)
    trace.save(tmp_path / "trace.safetensors")
    loaded = Trace.load(tmp_path / "trace.safetensors")
    assert_same(trace, loaded, rtol=0)
    assert (loaded.source_digest, loaded.model_type, loaded.domains) == (
        trace.source_digest,
        "mixtral",
        trace.domains,
    )
    for one, other in zip(trace.layers, loaded.layers, strict=True):
        assert torch.equal(one.choices, other.choices)
        assert (one.shape, one.top_k, one.expert_num_bytes) == (
            other.shape,
            other.top_k,
            other.expert_num_bytes,
        )


def test_sizes_come_from_the_layers() -> None:
    trace = observe(tiny_model("deepseek_v3"), TEXT, source_digest="sha256:given")
    assert trace.source_digest == "sha256:given"
    layer = trace.layers[0]
    assert layer.num_groups == 2
    assert layer.expert_num_bytes == 3 * layer.shape.d_model * layer.shape.d_expert * 4
    assert observe(tiny_model("deepseek_v3"), TEXT).source_digest.startswith("memory:")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = tiny_model("qwen3_moe", dtype=dtype)
    trace = observe(model, TEXT, statistics=["weighted_output_norm"])
    for layer in trace.layers:
        assert int(layer.load.sum()) == TEXT.num_tokens * layer.top_k
        assert layer.statistics["weighted_output_norm"].dtype == torch.float64
        assert bool((layer.statistics["weighted_output_norm"][layer.counts > 0] > 0).all())


def test_unknown_statistics_get_the_nearest_name() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'output_norm'"):
        observe(tiny_model("qwen3_moe"), TEXT, statistics=["output_nrom"])


def test_text_without_tokens_is_refused() -> None:
    empty = replace(TEXT, attention_mask=torch.zeros_like(TEXT.attention_mask))
    with pytest.raises(UserError, match="no text to observe"):
        observe(tiny_model("qwen3_moe"), empty)


def test_nan_in_a_router_is_named_by_its_layer() -> None:
    model = tiny_model("qwen3_moe")
    open_model(model).layers[1].router_weight()[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="routing weights of layer 1"):
        observe(model, TEXT)


def test_dense_models_are_refused() -> None:
    with pytest.raises(UnsupportedModelError):
        observe(nn.Linear(2, 2), TEXT)


def test_it_is_the_packages_own_observe() -> None:
    import mixtura

    assert mixtura.observe is observe
    assert mixtura.observe is observe
