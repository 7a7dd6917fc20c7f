"""Pruners on real routers: scores are what a plain loop over transformers' own modules makes them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, tiny_config, tiny_model
from family_checks import TOLERANCE, distance, run
from recording import expert_output, record, text
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from mixtura.checkpoints.skeleton import open_checkpoint
from mixtura.checkpoints.view import drop_experts, masked, open_model
from mixtura.data.tokens import TokenBatch
from mixtura.errors import UnsupportedModelError
from mixtura.methods import create, header, names
from mixtura.running.observing import observe
from mixtura.running.observing.checkpoint import observe_checkpoint
from mixtura.types import Budget, Plan
from mixtura.types.trace import Trace

# Weights that sum to one; that do not, with a shared expert and without; sigmoids, a bias and groups; a bias
# of the router's own; linear attention, state spaces.
MODELS = ("qwen3_moe", "qwen2_moe", "olmoe", "deepseek_v3", "gpt_oss", "qwen3_next", "jamba")
CAUSAL = tuple(family for family in FAMILIES if type(tiny_config(family)) in MODEL_FOR_CAUSAL_LM_MAPPING)
TEXT = text([17, 9, 24, 1, 12, 20], [0, 1, 0, 1, 1, 0], seed=3)
STATISTICS = names("statistics")


@dataclass
class Token:
    """What one layer did with one token."""

    domain: int
    experts: list[int]
    weights: list[float]
    outputs: list[Tensor]
    residual: Tensor
    logits: Tensor

    @property
    def change(self) -> float:
        """One minus the cosine of the token before and after its routed experts."""
        after = self.residual + sum(w * y for w, y in zip(self.weights, self.outputs, strict=True))
        cosine = float(self.residual @ after) / (float(self.residual.norm()) * float(after.norm()))
        return max(0.0, 1.0 - cosine)


@torch.no_grad()
def before_block(model: nn.Module, tokens: TokenBatch, block_name: str) -> list[Tensor]:
    """What a decoder layer adds its block to: its own output without the block's, sequence by sequence."""
    made: dict[str, list[Tensor]] = {"block": [], "layer": []}

    def hook_for(key: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: Any, output: Any) -> None:
            made[key].append((output[0] if isinstance(output, tuple) else output).flatten(0, -2))

        return hook

    layer_name = block_name.rpartition(".")[0]
    hooks = [
        model.get_submodule(block_name).register_forward_hook(hook_for("block")),
        model.get_submodule(layer_name).register_forward_hook(hook_for("layer")),
    ]
    for row in range(tokens.num_sequences):
        model(input_ids=tokens.input_ids[row][tokens.attention_mask[row].bool()][None], use_cache=False)
    for handle in hooks:
        handle.remove()
    return list(torch.cat(made["layer"]) - torch.cat(made["block"]))


@cache
def seen(family: str) -> tuple[nn.Module, dict[int, list[Token]]]:
    """A tiny model and, by decoder layer, what it did with every token of the text."""
    model = tiny_model(family)
    found = record(model, TEXT)
    layers: dict[int, list[Token]] = {}
    for layer in open_model(model).layers:
        experts = model.get_submodule(layer.name)
        router: Any = model.get_submodule(layer.router_name)
        residuals = before_block(model, TEXT, layer.block_name)
        bias = getattr(router, "bias", None)
        tokens = []
        for one, residual in zip(found[layer.name], residuals, strict=True):
            logits = layer.router_weight().detach() @ one.hidden + (0.0 if bias is None else bias.detach())
            outputs = [expert_output(experts, one.hidden, expert) for expert in one.experts]
            tokens.append(Token(one.domain, one.experts, one.weights, outputs, residual, logits))
        layers[layer.index] = tokens
    return model, layers


@cache
def observed(family: str) -> Trace:
    return observe(seen(family)[0], TEXT, statistics=STATISTICS, batch_tokens=40)


def choices(tokens: list[Token], expert: int) -> Iterator[tuple[Token, float, float]]:
    """The tokens of an expert with their weights and the norms of its outputs."""
    for token in tokens:
        if expert in token.experts:
            place = token.experts.index(expert)
            yield token, token.weights[place], float(token.outputs[place].norm())


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def top_logit(token: Token, expert: int) -> float:
    best = max(token.experts, key=lambda one: (float(token.logits[one]), -one))
    return float(token.logits[expert]) if expert == best else 0.0


def easy_ep(tokens: list[Token], expert: int) -> float:
    """Each domain's score over its sum in the layer, added up."""
    score = 0.0
    for domain in sorted({token.domain for token in tokens}):
        here = [token for token in tokens if token.domain == domain]
        sums = [sum(w * norm * token.change for token, w, norm in choices(here, e)) for e in range(8)]
        score += sums[expert] / sum(sums)
    return score


def utilisation(tokens: list[Token], expert: int) -> float:
    """The mean over domains of the share of their choices."""
    shares = []
    for domain in sorted({token.domain for token in tokens}):
        chosen = [e for token in tokens if token.domain == domain for e in token.experts]
        shares.append(chosen.count(expert) / len(chosen))
    return mean(shares)


# By pruner and settings, an expert's score by a plain loop.
SCORES: dict[str, tuple[str, dict[str, Any], Callable[[list[Token], int], float]]] = {
    "frequency": ("frequency", {}, lambda t, e: len(list(choices(t, e)))),
    "reap": ("reap", {}, lambda t, e: mean([w * norm for _, w, norm in choices(t, e)])),
    "reap renormalized": (
        "reap",
        {"renormalize": True},
        lambda t, e: mean([w / sum(token.weights) * norm for token, w, norm in choices(t, e)]),
    ),
    "sum of weighted norms": (
        "frequency_gate_norm",
        {},
        lambda t, e: sum(w * norm for _, w, norm in choices(t, e)),
    ),
    "mean norm": (
        "frequency_gate_norm",
        {"frequency": 0.0, "gate": 0.0},
        lambda t, e: mean([norm for _, _, norm in choices(t, e)]),
    ),
    "any exponents": (
        "frequency_gate_norm",
        {"frequency": 0.5, "gate": 0.0, "norm": 2.0},
        lambda t, e: math.sqrt(len(list(choices(t, e)))) * mean([n for _, _, n in choices(t, e)]) ** 2,
    ),
    "utilisation": ("utilisation", {}, utilisation),
    "max_activation": (
        "max_activation",
        {},
        lambda t, e: max(
            (float(x.outputs[x.experts.index(e)].abs().max()) for x, _, _ in choices(t, e)), default=0.0
        ),
    ),
    "pre_moe": ("pre_moe", {}, lambda t, e: sum(top_logit(token, e) for token, _, _ in choices(t, e))),
    "easy_ep": ("easy_ep", {}, easy_ep),
}


def kept(trace: Trace, plan: Plan) -> dict[int, set[int]]:
    return {x.index: set(range(8)) - set(plan.dropped().get(x.index, ())) for x in trace.layers}


def best(trace: Trace, layer: int, scores: list[float], each: int) -> set[int]:
    """The experts of highest score, the same number in each of the router's groups."""
    size = 8 // trace.layer(layer).num_groups
    groups = [range(start, start + size) for start in range(0, 8, size)]
    ranked = [sorted(group, key=lambda e: (-scores[e], e)) for group in groups]
    return {expert for group in ranked for expert in group[: each // len(groups)]}


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("name", SCORES)
def test_a_plan_keeps_what_a_plain_loop_ranks_highest(family: str, name: str) -> None:
    pruner, settings, score = SCORES[name]
    _, layers = seen(family)
    trace = observed(family)
    plan = create("pruners", pruner, **settings).plan(trace, Budget(num_experts=4))
    for index, tokens in layers.items():
        scores = [score(tokens, expert) for expert in range(8)]
        assert kept(trace, plan)[index] == best(trace, index, scores, 4), scores


@pytest.mark.parametrize("family", MODELS)
def test_a_domain_alone_is_scored_by_its_own_tokens(family: str) -> None:
    _, layers = seen(family)
    trace = observed(family)
    plans = {}
    for place, domain in enumerate(trace.domains):
        for name in ("reap", "easy_ep", "frequency"):
            pruner, settings, score = SCORES[name]
            plan = create("pruners", pruner, **settings).plan(trace.of(domain), Budget(num_experts=4))
            for index, tokens in layers.items():
                own = [token for token in tokens if token.domain == place]
                scores = [score(own, expert) for expert in range(8)]
                assert kept(trace, plan)[index] == best(trace, index, scores, 4), scores
            plans[domain, name] = plan
    assert plans[trace.domains[0], "reap"] != plans[trace.domains[1], "reap"]


@pytest.mark.parametrize("family", MODELS)
def test_statistics_of_whole_layers_are_those_of_a_plain_loop(family: str) -> None:
    _, layers = seen(family)
    trace = observed(family)
    for index, tokens in layers.items():
        layer = trace.layer(index)
        for expert in range(8):
            mine = list(choices(tokens, expert))
            expected = {
                "output_norm_by_change": mean([w * norm * token.change for token, w, norm in mine]),
                "top_logit": mean([top_logit(token, expert) for token, _, _ in mine]),
                "renormalized_output_norm": mean([w * norm / sum(t.weights) for t, w, norm in mine]),
            }
            for name, value in expected.items():
                assert float(layer.statistic(name)[expert]) == pytest.approx(value, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("family", MODELS)
def test_dropping_by_a_plan_equals_masking_and_cuts_every_row(family: str) -> None:
    model, _ = seen(family)
    trace = observed(family)
    protected = {trace.layers[0].index: (7,)}
    for name in names("pruners"):
        plan = create("pruners", name).plan(trace, Budget(num_experts=4, protected=protected))
        assert 7 in kept(trace, plan)[trace.layers[0].index]
        with masked(model, plan.dropped()):
            expected = run(model)
        pruned = drop_experts(copy.deepcopy(model), plan.dropped())
        assert distance(expected, run(pruned)) < TOLERANCE
        for old, new in zip(open_model(model).layers, open_model(pruned).layers, strict=True):
            stays = sorted(kept(trace, plan)[old.index])
            for tensor, axis in old.per_expert_tensors().items():
                rows = torch.tensor(stays)
                assert torch.equal(new.tensor(tensor), old.tensor(tensor).index_select(axis, rows)), tensor


def test_a_correction_bias_is_among_what_is_cut() -> None:
    layers = open_model(seen("deepseek_v3")[0]).layers
    assert all(x.site.correction_bias in x.per_expert_tensors() for x in layers)
    assert [x.num_groups for x in layers] == [2, 2]


def test_what_statistics_read_leaves_nothing_behind() -> None:
    model = tiny_model("deepseek_v3")

    def attached() -> dict[str, Any]:
        return {
            name: (sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
            for name, module in model.named_modules()
        }

    before = attached()
    plain = observe(model, TEXT)
    watched = observe(model, TEXT, statistics=STATISTICS)
    assert attached() == before
    for one, other in zip(plain.layers, watched.layers, strict=True):
        assert torch.equal(one.counts, other.counts)
        assert torch.equal(one.weight_sums, other.weight_sums)


def test_padding_and_batches_change_no_statistic_of_whole_layers() -> None:
    model = tiny_model("deepseek_v3")
    alone = observe(model, TEXT, statistics=STATISTICS, batch_tokens=1)
    left = replace(TEXT, input_ids=TEXT.input_ids.flip(1), attention_mask=TEXT.attention_mask.flip(1))
    for row, length in enumerate(TEXT.attention_mask.sum(1).tolist()):
        left.input_ids[row, left.input_ids.shape[1] - length :] = TEXT.input_ids[row, :length]
    for other in (observe(model, TEXT, statistics=STATISTICS), observe(model, left, statistics=STATISTICS)):
        for one, two in zip(alone.layers, other.layers, strict=True):
            for name in STATISTICS:
                torch.testing.assert_close(one.statistics[name], two.statistics[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stream", [False, True])
def test_a_checkpoint_on_disk_gives_the_same_loaded_or_streamed(tmp_path: Path, stream: bool) -> None:
    model = tiny_model("deepseek_v3")
    model.save_pretrained(tmp_path)
    view = open_checkpoint(tmp_path)
    found = observe_checkpoint(view, TEXT, statistics=STATISTICS, stream=stream, batch_tokens=40)
    for one, two in zip(observe(model, TEXT, statistics=STATISTICS).layers, found.layers, strict=True):
        for name in STATISTICS:
            torch.testing.assert_close(one.statistics[name], two.statistics[name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("family", CAUSAL)
def test_every_family_gives_whole_layers_or_says_why_not(family: str) -> None:
    model, refused = tiny_model(family), []
    for name in STATISTICS:
        try:
            trace = observe(model, TEXT, statistics=[name])
        except UnsupportedModelError as error:
            refused.append((name, str(error)))
        else:
            assert all(torch.isfinite(layer.statistics[name]).all() for layer in trace.layers)
    for name, message in refused:
        field = next(word for word in ("residual", "logits") if word in message)
        assert f"reads:{field}" in header("statistics", name).tags
