"""Decoders in families that keep states, choose row by row, or weigh experts in other ways."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
from families import tiny_model

import mixtura
from mixtura.authoring.contracts._decoded import tokenizer
from mixtura.errors import UnsupportedModelError
from mixtura.machine.releases import logits_weights_choices
from mixtura.methods import create
from mixtura.rerouting.core import Rerouting
from mixtura.running.decoders.entry import decode

mixtura.register_backend()
# Mamba, gated delta nets, short convolutions, and attention with convolutions beside its keys.
HYBRIDS = ("nemotron_h", "qwen3_next", "lfm2_moe", "zaya")


@cache
def model(family: str) -> Any:
    """A tiny model that runs its experts through mixtura's backend."""
    made: Any = tiny_model(family)
    made.set_experts_implementation("mixtura")
    return made


@pytest.mark.parametrize("family", HYBRIDS)
def test_layers_of_states_are_not_skipped(family: str) -> None:
    with pytest.raises(
        UnsupportedModelError, match="keeps states that every token changes, for which no oth"
    ):
        decode(model(family), tokenizer(), "abcd", "layer_skipping", speedup=1.2, max_new_tokens=2)
    with pytest.raises(UnsupportedModelError, match="so its rows cannot wait"):
        decode(
            model(family), tokenizer(), "abcd", "rebase", width=2, max_new_tokens=2,
            verifier=lambda prompt, texts: [0.0] * len(texts),
        )  # fmt: skip


@pytest.mark.parametrize("family", HYBRIDS)
def test_states_are_forked_with_the_keys(family: str) -> None:
    """Branches that are as good as greedy are each what greedy decoding makes of the prompt alone."""
    prompts = ["abcd", "efghijkl"]
    made = decode(
        model(family), tokenizer(), prompts, "self_consistency", n=3, temperature=1e-4, max_new_tokens=5
    )
    for prompt, one in zip(prompts, made, strict=True):
        alone = decode(model(family), tokenizer(), prompt, max_new_tokens=5).token_ids
        assert [branch.token_ids for branch in one.branches] == [alone] * 3


@pytest.mark.parametrize("decoder", ["scmoe", "des"])
def test_a_family_that_counts_on_its_own_number_of_experts_is_refused(decoder: str) -> None:
    settings: dict[str, Any] = {} if decoder == "scmoe" else {"experts": [2], "rollouts": 1}
    more = {} if decoder == "scmoe" else {"verifier": lambda prompt, texts: [0.0] * len(texts)}
    with pytest.raises(UnsupportedModelError, match=r"cannot give a token 2 experts|so its rows cannot wait"):
        decode(model("zaya"), tokenizer(), "abcd", decoder, max_new_tokens=2, **settings, **more)


def softmax(logits: list[float]) -> list[float]:
    """Probabilities; minus infinity has none."""
    powers = [math.exp(one) for one in logits]
    return [one / sum(powers) for one in powers]


def weighed(family: str, logits: list[float], masked: set[int], *, over_sum: bool) -> dict[int, float]:
    """A token's two experts and their weights where the logits of some are minus infinity, as papers say."""
    silenced = [-math.inf if e in masked else one for e, one in enumerate(logits)]
    best = sorted(range(len(logits)), key=lambda e: -silenced[e])[:2]
    if family == "gpt_oss":
        return dict(zip(best, softmax([silenced[e] for e in best]), strict=True))
    shares = softmax(silenced)
    whole = sum(shares[e] for e in best) if over_sum else 1.0
    return {e: shares[e] / whole for e in best}


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe", "mixtral", "gpt_oss"])
def test_masked_experts_are_silenced_before_the_others_are_weighed(family: str) -> None:
    inside = model(family)
    first = next(iter(Rerouting.of(inside).seats.values()))
    gate = first.gate
    Rerouting.of(inside).restore()
    over_sum = getattr(inside.config, "norm_topk_prob", True)
    assert over_sum == (family in ("mixtral", "gpt_oss"))
    seen: list[tuple[Any, Any]] = []
    hook = gate.register_forward_hook(lambda gate, given, made: seen.append((given[0], made)))
    pairs = [[0, 1], [0, 4], [0, 6]]
    prompts = ["abcd", "efghij"]
    decode(inside, tokenizer(), prompts, "mask_experts", experts=pairs, max_new_tokens=3)
    hook.remove()
    checked = 0
    for given, made in seen:
        _, weights, ids = logits_weights_choices(made)
        rows = given.reshape(-1, given.shape[-1])
        plain = rows @ gate.weight.T + (gate.bias if getattr(gate, "bias", None) is not None else 0.0)
        for row, own, chosen in zip(plain, weights.reshape(-1, 2), ids.reshape(-1, 2), strict=True):
            if not bool(row.any()):
                # Padding, of which all experts are alike.
                continue
            wanted = weighed(family, row.tolist(), {1, 4, 6}, over_sum=over_sum)
            found = dict(zip(chosen.tolist(), own.tolist(), strict=True))
            assert found == pytest.approx(wanted, rel=1e-4)
            checked += 1
    assert checked >= 10


def test_masks_are_by_token_where_a_family_chooses_row_by_row() -> None:
    """Zaya's router looks at rows and columns; a batch is masked as each of its prompts alone."""
    prompts = ["abcd", "efghijkl"]
    pairs = [[0, e] for e in range(4)]
    made = decode(model("zaya"), tokenizer(), prompts, "mask_experts", experts=pairs, max_new_tokens=4)
    for prompt, one in zip(prompts, made, strict=True):
        alone = decode(model("zaya"), tokenizer(), prompt, "mask_experts", experts=pairs, max_new_tokens=4)
        assert one.token_ids == alone.token_ids


def test_masks_in_groups_leave_every_token_its_experts() -> None:
    """DeepSeek's router masks groups first: what is silenced is chosen in no group."""
    inside = model("deepseek_v3")
    seen: list[Any] = []
    gate = inside.model.layers[1].mlp.gate
    hook = gate.register_forward_hook(lambda gate, given, made: seen.append(made))
    masked = {0, 1, 2, 5, 7}
    decode(
        inside, tokenizer(), "abcdefgh", "mask_experts", experts=[[1, e] for e in masked], max_new_tokens=4
    )
    hook.remove()
    for made in seen:
        _, weights, ids = logits_weights_choices(made)
        assert not set(ids.flatten().tolist()) & masked
        assert bool((weights > 0).all())
        assert all(len(set(row)) == len(row) for row in ids.reshape(-1, ids.shape[-1]).tolist())


def test_a_mask_joins_what_another_decoder_adds_to_logits() -> None:
    decoders = [
        create("decoders", "rewiring", steps=1, layers=1.0),
        create("decoders", "mask_experts", experts=[[0, 0]]),
    ]
    decode(model("qwen3_moe"), tokenizer(), "abcd", decoders, max_new_tokens=2)
